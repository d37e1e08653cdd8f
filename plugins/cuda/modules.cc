#include "cuda/modules.h"

#include <cstring>
#include <vector>

namespace longspan::cuda {
namespace {

constexpr unsigned kSharedWithoutOptIn = 48 * 1024;
constexpr size_t kLogBytes = 8192;

}  // namespace

LoadedKernel::LoadedKernel(std::shared_ptr<const Device> device, const Kernel& kernel) : device_(std::move(device)) {
  const DriverApi& api = device_->api();
  const Driver& driver = device_->driver();
  const CurrentContext current(*device_);
  // The driver reads PTX up to a zero, which a pack does not hold.
  std::vector<char> text;
  const void* image = kernel.code;
  if (kernel.form == "ptx") {
    text.assign(kernel.code, kernel.code + kernel.code_size);
    text.push_back('\0');
    image = text.data();
  }
  std::vector<char> log(kLogBytes, '\0');
  int options[] = {kJitErrorLogBuffer, kJitErrorLogBufferSizeBytes};
  void* values[] = {log.data(), reinterpret_cast<void*>(kLogBytes)};
  const CUresult loaded = api.module_load_data_ex(&module_, image, 2, options, values);
  log.back() = '\0';
  std::string what = kernel.name + " (" + kernel.form + " for sm_" + std::to_string(kernel.architecture) + ")";
  if (loaded != kSuccess && log[0] != '\0') what += ": " + std::string(log.data());
  driver.Check(loaded, what);
  try {
    driver.Check(api.module_get_function(&function_, module_, kernel.entry.c_str()), what + ": " + kernel.entry);
    Prepare(kernel);
  } catch (...) {
    api.module_unload(module_);
    throw;
  }
}

void LoadedKernel::Prepare(const Kernel& kernel) {
  const DriverApi& api = device_->api();
  const Driver& driver = device_->driver();
  // Since CUDA 12.2 a function is loaded when it is first needed: here and now.
  if (api.func_load != nullptr) driver.Check(api.func_load(function_), kernel.name + ": cuFuncLoad");
  int threads = 0;
  driver.Check(api.func_get_attribute(&threads, kMaxThreadsPerBlock, function_), kernel.name + ": cuFuncGetAttribute");
  if (static_cast<unsigned>(threads) < kernel.threads) {
    throw CudaError(kernel.name + " needs blocks of " + std::to_string(kernel.threads) + " threads, and may have " +
                        std::to_string(threads) + " on " + device_->Describe(),
                    -1);
  }
  if (kernel.shared > kSharedWithoutOptIn) {
    driver.Check(api.func_set_attribute(function_, kMaxDynamicSharedSizeBytes, static_cast<int>(kernel.shared)),
                 kernel.name + ": " + std::to_string(kernel.shared) + " bytes of shared memory");
  }
}

// At the end of the process the driver may be gone already; then there is nothing to unload.
LoadedKernel::~LoadedKernel() {
  const DriverApi& api = device_->api();
  CUcontext popped = nullptr;
  if (api.ctx_push_current(device_->context()) != kSuccess) return;
  api.module_unload(module_);
  api.ctx_pop_current(&popped);
}

// The caller holds the lock.
std::shared_ptr<const Driver> Modules::OpenDriver() {
  std::shared_ptr<const Driver> driver = driver_.lock();
  if (driver == nullptr) driver_ = driver = std::make_shared<const Driver>(library_);
  return driver;
}

int Modules::CurrentDevice() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::shared_ptr<const Driver> driver = OpenDriver();
  CUcontext context = nullptr;
  CUdevice device = 0;
  driver->Check(driver->api.ctx_get_current(&context), "cuCtxGetCurrent");
  if (context != nullptr) driver->Check(driver->api.ctx_get_device(&device), "cuCtxGetDevice");
  return device;
}

std::shared_ptr<const Device> Modules::GetDevice(int ordinal) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<const Device> device = devices_[ordinal].lock();
  if (device == nullptr) {
    devices_[ordinal] = device = std::make_shared<const Device>(OpenDriver(), ordinal);
  }
  return device;
}

std::shared_ptr<const LoadedKernel> Modules::Load(const std::shared_ptr<const Device>& device, const Kernel& kernel) {
  std::string key(reinterpret_cast<const char*>(kernel.digest.data()), kernel.digest.size());
  key += kernel.entry + " " + std::to_string(kernel.threads) + " " + std::to_string(kernel.shared);
  const std::lock_guard<std::mutex> lock(mutex_);
  std::weak_ptr<const LoadedKernel>& entry = kernels_[{device->ordinal, key}];
  std::shared_ptr<const LoadedKernel> loaded = entry.lock();
  if (loaded == nullptr) entry = loaded = std::make_shared<const LoadedKernel>(device, kernel);
  return loaded;
}

}  // namespace longspan::cuda
