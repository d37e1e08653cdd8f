// Entry points of liblongspan_trt*.so, which TensorRT finds by name when it loads a library of plugins.
#include <NvInferRuntime.h>

#include <array>

#include "tensorrt/attention_creator.h"
#include "tensorrt/messages.h"

#define LONGSPAN_EXPORT __attribute__((visibility("default")))

// The major version of TensorRT that this library is for, readable without loading it: an ELF note named "longspan" of
// type 1. Loading a library of another version can end the process.
#define LONGSPAN_TEXT(value) LONGSPAN_TEXT_OF(value)
#define LONGSPAN_TEXT_OF(value) #value
__asm__(
    ".pushsection .note.longspan, \"a\", %note\n"
    ".balign 4\n"
    ".long 9\n"  // of the name, with its zero
    ".long 4\n"  // of what follows it
    ".long 1\n"
    ".asciz \"longspan\"\n"
    ".balign 4\n"
    ".long " LONGSPAN_TEXT(NV_TENSORRT_MAJOR) "\n"
    ".popsection\n");

namespace longspan::trt {
namespace {

constexpr size_t kCreators = 2;

// Made at the first call, and as long-lived as the library. Everything that plugins share hangs on them.
const std::array<nvinfer1::IPluginCreatorInterface*, kCreators>& Creators() {
  static const auto owners = MakeCreators(std::make_shared<cuda::Runtime>());
  static const std::array<nvinfer1::IPluginCreatorInterface*, kCreators> creators = {owners[0].get(), owners[1].get()};
  return creators;
}

}  // namespace
}  // namespace longspan::trt

extern "C" LONGSPAN_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  const auto& creators = longspan::trt::Creators();
  count = static_cast<int32_t>(creators.size());
  return creators.data();
}

extern "C" LONGSPAN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  longspan::trt::SetLoggerFinder(finder);
}
