// Stands in for libcuda.so.1: it computes nothing, remembers every call that matters, and fails where a test says so.
//
// The code of a kernel in a test is text instead of machine code: "\x7f" "ELFstub ENTRY SIZE SIZE …\n" (for PTX without
// the first four bytes), where the sizes are those of the parameters in bytes.
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/driver_api.h"
#include "stub_driver.h"

struct CUctx_st {
  int device;
};
struct CUmod_st {
  std::string text;
};
struct CUfunc_st {
  std::string name;
  std::vector<size_t> sizes;
};

namespace {

std::mutex mutex;
Stub state;
CUctx_st contexts[2] = {{0}, {1}};  // the primary ones
CUctx_st created = {0};
thread_local std::vector<CUcontext> current;

// What a function returns: an error where the test asked for one.
CUresult Result(const char* function) {
  const auto found = state.failures.find(function);
  return found == state.failures.end() ? 0 : found->second;
}

void Log(const std::string& line) { state.calls.push_back(line); }

}  // namespace

#define STUB extern "C" __attribute__((visibility("default")))

STUB Stub* GetStub() { return &state; }

// The calls since the last time, one a line, for programs that are not C++.
STUB const char* TakeCalls() {
  static std::string text;
  const std::lock_guard<std::mutex> lock(mutex);
  text.clear();
  for (const std::string& call : state.calls) text += call + "\n";
  state.calls.clear();
  return text.c_str();
}

STUB CUresult cuInit(unsigned) { return Result("cuInit"); }

STUB CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : nullptr;
  return error == 2 ? 0 : 1;
}

STUB CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == 2 ? "out of memory" : nullptr;
  return error == 2 ? 0 : 1;
}

STUB CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal > 1) return 101;
  *device = ordinal;
  return Result("cuDeviceGet");
}

STUB CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  std::snprintf(name, static_cast<size_t>(size), "Stub");
  return Result("cuDeviceGetName");
}

STUB CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice) {
  switch (attribute) {
    case 16:
      *value = state.multiprocessors;
      break;
    case 75:
      *value = state.capability / 10;
      break;
    case 76:
      *value = state.capability % 10;
      break;
    case 97:
      *value = state.shared_memory;
      break;
    default:
      return 1;
  }
  return Result("cuDeviceGetAttribute");
}

STUB CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (const CUresult result = Result("cuDevicePrimaryCtxRetain")) return result;
  *context = &contexts[device];
  ++state.contexts;
  return 0;
}

STUB CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
  const std::lock_guard<std::mutex> lock(mutex);
  --state.contexts;
  return 0;
}

// One more context of device 0.
STUB CUresult cuCtxCreate_v2(CUcontext* context, unsigned, CUdevice) {
  current.push_back(*context = &created);
  return 0;
}

STUB CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current.empty() ? nullptr : current.back();
  return Result("cuCtxGetCurrent");
}

STUB CUresult cuCtxGetDevice(CUdevice* device) {
  if (current.empty()) return 201;
  *device = current.back()->device;
  return Result("cuCtxGetDevice");
}

STUB CUresult cuCtxPushCurrent_v2(CUcontext context) {
  if (const CUresult result = Result("cuCtxPushCurrent")) return result;
  current.push_back(context);
  return 0;
}

STUB CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (current.empty()) return 201;
  *context = current.back();
  current.pop_back();
  return 0;
}

STUB CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count, int* options, void** values) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (current.empty()) return 201;
  const char* text = static_cast<const char*>(image);
  const bool cubin = std::memcmp(text,
                                 "\x7f"
                                 "ELF",
                                 4) == 0;
  const CUresult result = Result(cubin ? "cuModuleLoadDataEx cubin" : "cuModuleLoadDataEx ptx");
  if (result != 0) {
    for (unsigned i = 0; i < count; ++i) {
      if (options[i] == 5) std::strcpy(static_cast<char*>(values[i]), "said the compiler");
    }
    return result;
  }
  text += cubin ? 4 : 0;
  if (std::strncmp(text, "stub ", 5) == 0) {
    *module = new CUmod_st{cubin ? std::string(text, std::strchr(text, '\n')) : std::string(text)};
    Log("load " + std::string(cubin ? "cubin " : "ptx ") + (*module)->text.substr(0, (*module)->text.find('\n')));
  } else {  // a compiler's code, of which only PTX can be read here
    *module = new CUmod_st{cubin ? "" : text};
    Log("load " + std::string(cubin ? "cubin" : "ptx"));
  }
  ++state.modules;
  return 0;
}

STUB CUresult cuModuleUnload(CUmodule module) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (current.empty()) return 201;
  delete module;
  --state.modules;
  return 0;
}

STUB CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (const CUresult result = Result("cuModuleGetFunction")) return result;
  std::istringstream words(module->text);
  std::string stub, entry;
  words >> stub >> entry;
  const bool real = stub != "stub";
  if (real && !module->text.empty() && module->text.find(std::string(".entry ") + name + "(") == std::string::npos)
    return 500;
  if (real) entry = name;
  if (entry != name) return 500;
  static std::map<std::string, CUfunc_st> all;
  CUfunc_st& made = all[real ? entry : module->text];
  made = {entry, {}};
  for (size_t size = 0; !real && words >> size;) made.sizes.push_back(size);
  *function = &made;
  return 0;
}

STUB CUresult cuFuncLoad(CUfunction function) {
  const std::lock_guard<std::mutex> lock(mutex);
  Log("prepare " + function->name);
  return Result("cuFuncLoad");
}

STUB CUresult cuFuncGetAttribute(int* value, int attribute, CUfunction) {
  if (attribute != 0) return 1;
  *value = state.threads;
  return Result("cuFuncGetAttribute");
}

STUB CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (attribute != 8) return 1;
  Log("shared " + function->name + " " + std::to_string(value));
  return Result("cuFuncSetAttribute");
}

STUB CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t bytes, CUstream stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::ostringstream line;
  line << "memset " << std::hex << address << std::dec << " " << int{value} << " " << bytes << " stream "
       << reinterpret_cast<size_t>(stream);
  Log(line.str());
  return Result("cuMemsetD8Async");
}

STUB CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream,
                             void** parameters, void** extra) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (current.empty() || extra != nullptr) return 201;
  std::ostringstream line;
  line << "launch " << function->name << " grid " << grid_x << "," << grid_y << "," << grid_z << " block " << block_x
       << "," << block_y << "," << block_z << " shared " << shared_bytes << " stream "
       << reinterpret_cast<size_t>(stream) << " parameters" << std::hex;
  for (size_t i = 0; i < function->sizes.size(); ++i) {
    uint64_t value = 0;
    std::memcpy(&value, parameters[i], function->sizes[i]);
    line << " " << value;
  }
  Log(line.str());
  return Result("cuLaunchKernel");
}
