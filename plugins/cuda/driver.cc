#include "cuda/driver.h"

#include <dlfcn.h>

namespace longspan::cuda {

Driver::Driver(const std::string& library) {
  library_ = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library_ == nullptr) {
    const char* why = dlerror();
    throw CudaError("no CUDA driver: " + std::string(why != nullptr ? why : library) +
                        "; next step: install NVIDIA's driver, or run on the CPU",
                    -1);
  }
  std::string missing;
#define LONGSPAN_FIND(member, symbol, parameters) \
  api.member = reinterpret_cast<decltype(api.member)>(dlsym(library_, #symbol));
#define LONGSPAN_REQUIRE(member, symbol, parameters) \
  LONGSPAN_FIND(member, symbol, parameters)          \
  if (api.member == nullptr) missing += (missing.empty() ? "" : ", ") + std::string(#symbol);
  LONGSPAN_CUDA_FUNCTIONS(LONGSPAN_REQUIRE)
  LONGSPAN_CUDA_NEWER_FUNCTIONS(LONGSPAN_FIND)
#undef LONGSPAN_REQUIRE
#undef LONGSPAN_FIND
  try {
    if (!missing.empty()) {
      throw CudaError(library + " lacks " + missing + "; next step: a driver of CUDA 11.8 or newer", -1);
    }
    Check(api.init(0), "cuInit");
  } catch (...) {
    dlclose(library_);
    throw;
  }
}

// The driver stays loaded, as whoever else uses it expects; this only drops our count.
Driver::~Driver() { dlclose(library_); }

void Driver::Check(CUresult result, const std::string& what) const {
  if (result == kSuccess) return;
  const char *name = nullptr, *text = nullptr;
  if (api.get_error_name(result, &name) != kSuccess || name == nullptr) name = "unknown error";
  if (api.get_error_string(result, &text) != kSuccess || text == nullptr) text = "no description";
  throw CudaError(what + ": " + name + " (" + std::to_string(result) + "): " + text, result);
}

Device::Device(std::shared_ptr<const Driver> driver, int ordinal) : ordinal(ordinal), driver_(std::move(driver)) {
  const std::string where = "CUDA device " + std::to_string(ordinal);
  driver_->Check(api().device_get(&device_, ordinal), where);
  char name[256] = {};
  driver_->Check(api().device_get_name(name, sizeof name - 1, device_), where);
  name_ = name;
  const auto attribute = [&](int number) {
    int value = 0;
    driver_->Check(api().device_get_attribute(&value, number, device_), where + ": attribute");
    return value;
  };
  capability = 10 * attribute(kComputeCapabilityMajor) + attribute(kComputeCapabilityMinor);
  multiprocessors = attribute(kMultiprocessorCount);
  shared_memory = attribute(kMaxSharedMemoryPerBlockOptin);
  driver_->Check(api().primary_ctx_retain(&context_, device_), where + ": primary context");
}

// At the end of the process the driver may be gone already, and says so; nothing depends on it.
Device::~Device() { api().primary_ctx_release(device_); }

std::string Device::Describe() const {
  return "device " + std::to_string(ordinal) + " (" + name_ + ", compute capability " +
         std::to_string(capability / 10) + "." + std::to_string(capability % 10) + ")";
}

void Device::ExpectPrimaryContext() const {
  CUcontext current = nullptr;
  driver_->Check(api().ctx_get_current(&current), "cuCtxGetCurrent");
  if (current == nullptr || current == context_) return;
  throw CudaError("the current CUDA context is not the primary one of " + Describe() +
                      ", which kernels are loaded into; next step: make no context of your own (cudaSetDevice does "
                      "what is needed; with PyCUDA, pycuda.autoprimaryctx)",
                  -1);
}

CurrentContext::CurrentContext(const Device& device) : device_(device) {
  CUcontext current = nullptr;
  device_.driver().Check(device_.api().ctx_get_current(&current), "cuCtxGetCurrent");
  if (current == device_.context()) return;
  device_.driver().Check(device_.api().ctx_push_current(device_.context()), "cuCtxPushCurrent");
  pushed_ = true;
}

CurrentContext::~CurrentContext() {
  CUcontext popped = nullptr;
  if (pushed_) device_.api().ctx_pop_current(&popped);
}

}  // namespace longspan::cuda
