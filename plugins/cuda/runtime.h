// What all kernels of the process share: the packs that are loaded, and what of them is on devices.
#ifndef LONGSPAN_CUDA_RUNTIME_H_
#define LONGSPAN_CUDA_RUNTIME_H_

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/modules.h"
#include "cuda/pack.h"

namespace longspan::cuda {

// Names packs, see "How a model finds its pack" in docs/kernel-packs.md.
constexpr const char* kPackPathVariable = "LONGSPAN_KERNEL_PATH";

using Packs = std::vector<std::shared_ptr<const Pack>>;

// The packs of files and folders separated by ':'; of a folder every *.pack in the order of names. Throws InvalidPack.
Packs ReadPackPath(const std::string& path);

// Safe to call from several threads.
class Runtime {
 public:
  explicit Runtime(std::string library = "libcuda.so.1") : modules_(std::move(library)) {}

  // The pack of these bytes, shared with whoever has the same; it can be found for as long as somebody holds it. Throws
  // InvalidPack.
  std::shared_ptr<const Pack> AddPack(std::vector<uint8_t> data);
  // nullptr where nobody holds a pack of that id: 64 hexadecimal digits.
  std::shared_ptr<const Pack> FindPack(const std::string& id);
  // Those that the environment variable names; read once. Throws InvalidPack.
  Packs PathPacks();

  Modules& modules() { return modules_; }

 private:
  Modules modules_;
  std::mutex mutex_;
  std::map<std::string, std::weak_ptr<const Pack>> packs_;
  std::map<std::string, Packs> paths_;
};

// The process's one.
Runtime& SharedRuntime();

// The driver that SharedRuntime opens; to be set before it is first asked for.
inline const char* g_driver_library = "libcuda.so.1";

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_RUNTIME_H_
