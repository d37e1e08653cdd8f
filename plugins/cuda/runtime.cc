#include "cuda/runtime.h"

#include <cstdlib>
#include <filesystem>
#include <set>

#include "cuda/text.h"

namespace longspan::cuda {

Packs ReadPackPath(const std::string& path) {
  namespace fs = std::filesystem;
  Packs packs;
  for (const std::string_view part : Split(path, ':')) {
    if (part.empty()) continue;
    const fs::path place(part);
    std::error_code error;
    std::set<std::string> files;
    if (fs::is_directory(place, error)) {
      for (const fs::directory_entry& entry : fs::directory_iterator(place, error)) {
        if (entry.path().extension() == ".pack" && entry.is_regular_file(error)) files.insert(entry.path().string());
      }
    } else {
      files.insert(place.string());
    }
    for (const std::string& file : files) packs.push_back(Pack::FromFile(file));
  }
  return packs;
}

std::shared_ptr<const Pack> Runtime::AddPack(std::vector<uint8_t> data) {
  std::shared_ptr<const Pack> pack = Pack::FromBytes(std::move(data));
  const std::lock_guard<std::mutex> lock(mutex_);
  std::weak_ptr<const Pack>& entry = packs_[pack->id];
  if (std::shared_ptr<const Pack> known = entry.lock()) return known;
  entry = pack;
  return pack;
}

std::shared_ptr<const Pack> Runtime::FindPack(const std::string& id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = packs_.find(id);
  return found == packs_.end() ? nullptr : found->second.lock();
}

Packs Runtime::PathPacks() {
  const char* path = std::getenv(kPackPathVariable);
  if (path == nullptr) return {};
  const std::lock_guard<std::mutex> lock(mutex_);
  auto found = paths_.find(path);
  if (found == paths_.end()) {
    try {
      found = paths_.emplace(path, ReadPackPath(path)).first;
    } catch (const InvalidPack& error) {
      throw InvalidPack(std::string(kPackPathVariable) + ": " + error.what());
    }
  }
  return found->second;
}

// Never destroyed: sessions may outlive static objects.
Runtime& SharedRuntime() {
  static Runtime* const runtime = new Runtime(g_driver_library);
  return *runtime;
}

}  // namespace longspan::cuda
