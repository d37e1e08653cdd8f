// liblongspan_trt*_loader.so: registers the plugins of liblongspan_trt*.so, which lies beside it, when it is opened.
//
// For programs that open plugin libraries with dlopen() and do no more: Triton Inference Server's TensorRT backend
// (plugins=…), ONNX Runtime's TensorRT provider (trt_extra_plugin_lib_paths). Plugins of version 3 are found through
// getCreators, which TensorRT's registry calls in libraries that it opens itself. The plugins' own library cannot
// register itself: the registry refuses to open one whose plugins it has already, so programs that do ask the registry
// would fail.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <string>

#define LONGSPAN_TEXT(value) LONGSPAN_TEXT_OF(value)
#define LONGSPAN_TEXT_OF(value) #value

namespace {

constexpr char kTensorRT[] = "libnvinfer.so." LONGSPAN_TEXT(NV_TENSORRT_MAJOR);
constexpr char kPlugins[] = "liblongspan_trt" LONGSPAN_TEXT(NV_TENSORRT_MAJOR) ".so";

void Complain(const std::string& text) {
  std::fprintf(stderr, "longspan: the TensorRT plugins are not registered: %s\n", text.c_str());
}

// The folder of this library, with a slash at the end; empty for the one that the dynamic linker searches.
std::string Folder() {
  Dl_info info{};
  if (dladdr(&kPlugins, &info) == 0 || info.dli_fname == nullptr) return "";
  const std::string file = info.dli_fname;
  return file.substr(0, file.rfind('/') + 1);
}

__attribute__((constructor)) void Register() {
  // Opened by whoever uses it, maybe for itself alone, so its functions are not to be seen by name from here.
  void* tensorrt = dlopen(kTensorRT, RTLD_NOW | RTLD_NOLOAD);
  if (tensorrt == nullptr) {
    // Programs that cannot know which TensorRT there is may open the loaders of several.
    for (const char* other : {"libnvinfer.so.10", "libnvinfer.so.11"}) {
      if (void* library = dlopen(other, RTLD_NOW | RTLD_NOLOAD)) {
        dlclose(library);
        return;
      }
    }
    Complain(std::string(kTensorRT) +
             " is not loaded yet; next step: let the program load this library after TensorRT, "
             "not LD_PRELOAD");
    return;
  }
  using GetRegistry = nvinfer1::IPluginRegistry* (*)() noexcept;
  const auto get = reinterpret_cast<GetRegistry>(dlsym(tensorrt, "getPluginRegistry"));
  const std::string plugins = Folder() + kPlugins;
  if (get == nullptr || get() == nullptr) {
    Complain(std::string(kTensorRT) + " has no plugin registry");
  } else if (get()->loadLibrary(plugins.c_str()) == nullptr) {
    Complain("TensorRT did not load " + plugins + "; its log says why (plugins that are registered already, perhaps)");
  }
  // The registry belongs to TensorRT, which stays loaded with the program that opened it.
  dlclose(tensorrt);
}

}  // namespace
