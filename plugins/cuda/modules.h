// Kernels' code, loaded into a device once for all nodes and sessions that use it.
#ifndef LONGSPAN_CUDA_MODULES_H_
#define LONGSPAN_CUDA_MODULES_H_

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/driver.h"
#include "cuda/pack.h"

namespace longspan::cuda {

// A kernel that can be launched; unloaded when the last user lets go of it.
class LoadedKernel {
 public:
  // Loads the code (PTX is compiled by the driver), and makes sure that nothing is left to load at the first launch,
  // which may be captured into a CUDA graph. Throws CudaError.
  LoadedKernel(std::shared_ptr<const Device> device, const Kernel& kernel);
  ~LoadedKernel();
  LoadedKernel(const LoadedKernel&) = delete;
  LoadedKernel& operator=(const LoadedKernel&) = delete;

  CUfunction function() const { return function_; }

 private:
  void Prepare(const Kernel& kernel);

  const std::shared_ptr<const Device> device_;
  CUmodule module_ = nullptr;
  CUfunction function_ = nullptr;
};

// The devices in use and what is loaded into them. Safe to call from several threads.
class Modules {
 public:
  explicit Modules(std::string library = "libcuda.so.1") : library_(std::move(library)) {}

  // Number of the device whose context is current in the calling thread; 0, which the CUDA runtime would take, where
  // there is none. Throws CudaError.
  int CurrentDevice();
  // Opens the driver on the first call. Throws CudaError.
  std::shared_ptr<const Device> GetDevice(int ordinal);
  // Throws CudaError.
  std::shared_ptr<const LoadedKernel> Load(const std::shared_ptr<const Device>& device, const Kernel& kernel);

 private:
  std::shared_ptr<const Driver> OpenDriver();

  const std::string library_;
  std::mutex mutex_;
  std::weak_ptr<const Driver> driver_;
  std::map<int, std::weak_ptr<const Device>> devices_;
  // By device, code, and what the function is prepared for.
  std::map<std::pair<int, std::string>, std::weak_ptr<const LoadedKernel>> kernels_;
};

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_MODULES_H_
