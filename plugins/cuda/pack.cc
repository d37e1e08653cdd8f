#include "cuda/pack.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>

#include "cuda/pack_index.h"
#include "cuda/pack_rules.h"
#include "cuda/text.h"

namespace longspan::cuda {
namespace {

constexpr uint8_t kMagic[8] = {0x89, 'L', 'S', 'P', 'A', 'C', 'K', '\n'};
constexpr size_t kHashed = 32, kIndexStart = 64;
constexpr uint64_t kMaxIndexBytes = uint64_t{16} << 20;

template <typename T>
T Number(const std::vector<uint8_t>& data, size_t at) {
  T value = 0;
  for (size_t i = 0; i < sizeof value; ++i) value |= static_cast<T>(data[at + i]) << (8 * i);
  return value;
}

// Checks the header and the hash. Returns the size of the index.
size_t CheckHeader(const std::vector<uint8_t>& data, Pack* pack) {
  if (data.size() < kIndexStart) {
    throw InvalidPack("is " + std::to_string(data.size()) + " bytes long, less than the header of a kernel pack (64)");
  }
  if (!std::equal(std::begin(kMagic), std::end(kMagic), data.begin())) {
    throw InvalidPack("is not a kernel pack: it begins otherwise");
  }
  const auto version = Number<uint32_t>(data, 8), contract = Number<uint32_t>(data, 12);
  const auto size = Number<uint64_t>(data, 16), index = Number<uint64_t>(data, 24);
  if (version != kFormatVersion) {
    throw InvalidPack("has format version " + std::to_string(version) + "; this library reads " +
                      std::to_string(kFormatVersion) + "; compile it again");
  }
  if (contract != kContractVersion) {
    throw InvalidPack("has contract version " + std::to_string(contract) + "; this library launches " +
                      std::to_string(kContractVersion) + "; compile it again");
  }
  if (size != data.size()) {
    throw InvalidPack("is " + std::to_string(data.size()) + " bytes long, and was written with " +
                      std::to_string(size) + ": it is truncated, or has more");
  }
  if (const uint64_t most = std::min<uint64_t>(kMaxIndexBytes, size - kIndexStart); index > most) {
    throw InvalidPack("has an index of " + std::to_string(index) + " bytes; allowed: " + std::to_string(most));
  }
  Sha256 hash;
  hash.Update(data.data(), kHashed);
  hash.Update(data.data() + kIndexStart, data.size() - kIndexStart);
  const Digest digest = hash.Finish();
  if (!std::equal(digest.begin(), digest.end(), data.begin() + kHashed)) {
    throw InvalidPack("differs from what was written (SHA-256)");
  }
  pack->id = Hex(digest);
  return static_cast<size_t>(index);
}

}  // namespace

std::shared_ptr<const Pack> Pack::FromBytes(std::vector<uint8_t> data) {
  auto pack = std::make_shared<Pack>();
  const size_t index = CheckHeader(data, pack.get());
  pack->data_ = std::move(data);
  ReadIndex(pack->data_, kIndexStart, index, pack.get());
  CheckPack(*pack);
  return pack;
}

std::shared_ptr<const Pack> Pack::FromFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw InvalidPack(path + ": cannot be opened: " + std::strerror(errno));
  std::vector<uint8_t> data{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) throw InvalidPack(path + ": cannot be read");
  try {
    return FromBytes(std::move(data));
  } catch (const InvalidPack& error) {
    throw InvalidPack(path + ": " + error.what());
  }
}

}  // namespace longspan::cuda
