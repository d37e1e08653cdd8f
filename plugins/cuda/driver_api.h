// The part of the CUDA driver API that the launcher calls, declared here so that building needs no CUDA toolkit. Names,
// values and signatures are those of the driver's stable binary interface (CUDA Driver API reference).
#ifndef LONGSPAN_CUDA_DRIVER_API_H_
#define LONGSPAN_CUDA_DRIVER_API_H_

#include <cstddef>
#include <cstdint>

extern "C" {

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st* CUcontext;
typedef struct CUmod_st* CUmodule;
typedef struct CUfunc_st* CUfunction;
typedef struct CUstream_st* CUstream;

}  // extern "C"

namespace longspan::cuda {

// CUresult
constexpr CUresult kSuccess = 0;

// CUdevice_attribute
constexpr int kMultiprocessorCount = 16;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kMaxSharedMemoryPerBlockOptin = 97;

// CUfunction_attribute
constexpr int kMaxThreadsPerBlock = 0;
constexpr int kMaxDynamicSharedSizeBytes = 8;

// CUjit_option
constexpr int kJitErrorLogBuffer = 5;
constexpr int kJitErrorLogBufferSizeBytes = 6;

// Every function by member; `X(member, symbol, parameters)`. Symbols with a version suffix are what the toolkit's
// headers make of the plain name.
#define LONGSPAN_CUDA_FUNCTIONS(X)                                                                               \
  X(init, cuInit, (unsigned flags))                                                                              \
  X(get_error_name, cuGetErrorName, (CUresult error, const char** name))                                         \
  X(get_error_string, cuGetErrorString, (CUresult error, const char** text))                                     \
  X(device_get, cuDeviceGet, (CUdevice * device, int ordinal))                                                   \
  X(device_get_name, cuDeviceGetName, (char* name, int size, CUdevice device))                                   \
  X(device_get_attribute, cuDeviceGetAttribute, (int* value, int attribute, CUdevice device))                    \
  X(primary_ctx_retain, cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                        \
  X(primary_ctx_release, cuDevicePrimaryCtxRelease_v2, (CUdevice device))                                        \
  X(ctx_get_current, cuCtxGetCurrent, (CUcontext * context))                                                     \
  X(ctx_get_device, cuCtxGetDevice, (CUdevice * device))                                                         \
  X(ctx_push_current, cuCtxPushCurrent_v2, (CUcontext context))                                                  \
  X(ctx_pop_current, cuCtxPopCurrent_v2, (CUcontext * context))                                                  \
  X(module_load_data_ex, cuModuleLoadDataEx,                                                                     \
    (CUmodule * module, const void* image, unsigned count, int* options, void** values))                         \
  X(module_unload, cuModuleUnload, (CUmodule module))                                                            \
  X(module_get_function, cuModuleGetFunction, (CUfunction * function, CUmodule module, const char* name))        \
  X(func_get_attribute, cuFuncGetAttribute, (int* value, int attribute, CUfunction function))                    \
  X(func_set_attribute, cuFuncSetAttribute, (CUfunction function, int attribute, int value))                     \
  X(memset_d8_async, cuMemsetD8Async, (CUdeviceptr address, unsigned char value, size_t bytes, CUstream stream)) \
  X(launch_kernel, cuLaunchKernel,                                                                               \
    (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, \
     unsigned block_z, unsigned shared_bytes, CUstream stream, void** parameters, void** extra))

// Functions of newer drivers, null where the driver lacks them. cuFuncLoad came with CUDA 12.4.
#define LONGSPAN_CUDA_NEWER_FUNCTIONS(X) X(func_load, cuFuncLoad, (CUfunction function))

struct DriverApi {
#define LONGSPAN_MEMBER(member, symbol, parameters) CUresult(*member) parameters = nullptr;
  LONGSPAN_CUDA_FUNCTIONS(LONGSPAN_MEMBER)
  LONGSPAN_CUDA_NEWER_FUNCTIONS(LONGSPAN_MEMBER)
#undef LONGSPAN_MEMBER
};

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_DRIVER_API_H_
