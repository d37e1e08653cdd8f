// The CUDA driver, opened at run time, and the devices it knows.
#ifndef LONGSPAN_CUDA_DRIVER_H_
#define LONGSPAN_CUDA_DRIVER_H_

#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/driver_api.h"

namespace longspan::cuda {

// What the driver refused, or that there is none.
class CudaError : public std::runtime_error {
 public:
  CudaError(const std::string& message, CUresult code) : std::runtime_error(message), code(code) {}

  const CUresult code;
};

class Driver {
 public:
  // Opens the library and initialises the driver. Throws CudaError when there is no such library, when a function is
  // missing in it, or when it finds no device.
  explicit Driver(const std::string& library = "libcuda.so.1");
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // Throws CudaError with the driver's own words unless `result` is success.
  void Check(CUresult result, const std::string& what) const;

  DriverApi api;

 private:
  void* library_ = nullptr;
};

// One device with its primary context: the one that the CUDA runtime makes, so that of ONNX Runtime too.
class Device {
 public:
  // `ordinal` as in CUDA_VISIBLE_DEVICES' numbering. Throws CudaError.
  Device(std::shared_ptr<const Driver> driver, int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const Driver& driver() const { return *driver_; }
  const DriverApi& api() const { return driver_->api; }
  CUcontext context() const { return context_; }

  // "device 0 (NAME, compute capability 9.0)"
  std::string Describe() const;

  // Throws CudaError where the calling thread works in another context of the device, on whose streams kernels of the
  // primary one do not run.
  void ExpectPrimaryContext() const;

  const int ordinal;
  int capability = 0;  // 10 * major + minor
  int multiprocessors = 0;
  int shared_memory = 0;  // bytes per block, with the opt-in

 private:
  const std::shared_ptr<const Driver> driver_;
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  std::string name_;
};

// Makes a device's context current for a scope, unless it is already.
class CurrentContext {
 public:
  explicit CurrentContext(const Device& device);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const Device& device_;
  bool pushed_ = false;
};

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_DRIVER_H_
