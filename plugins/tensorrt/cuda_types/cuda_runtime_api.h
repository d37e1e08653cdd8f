// What TensorRT's headers take from the CUDA toolkit: two types. With this file they need no toolkit.
#ifndef LONGSPAN_TENSORRT_CUDA_TYPES_CUDA_RUNTIME_API_H_
#define LONGSPAN_TENSORRT_CUDA_TYPES_CUDA_RUNTIME_API_H_

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

#endif  // LONGSPAN_TENSORRT_CUDA_TYPES_CUDA_RUNTIME_API_H_
