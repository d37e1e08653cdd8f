// What the plugins have to say, to TensorRT's logger; no exception leaves them.
#ifndef LONGSPAN_TENSORRT_MESSAGES_H_
#define LONGSPAN_TENSORRT_MESSAGES_H_

#include <NvInferRuntime.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace longspan::trt {

// TensorRT's way to its logger, given to the library when it is loaded. The first one is kept.
void SetLoggerFinder(nvinfer1::ILoggerFinder* finder);

// One line to the logger of the calling thread's builder or runtime, or to the standard error stream where TensorRT has
// given the library none; and to `recorder`, which may be null.
void Report(const std::string& who, const char* what, nvinfer1::IErrorRecorder* recorder,
            nvinfer1::ErrorCode code) noexcept;

// Runs `body`; whatever it throws is reported. Returns whether it threw nothing.
template <typename Body>
bool Guarded(const std::string& who, nvinfer1::IErrorRecorder* recorder, const Body& body) noexcept {
  using nvinfer1::ErrorCode;
  try {
    body();
    return true;
  } catch (const std::bad_alloc&) {
    Report(who, "no memory", recorder, ErrorCode::kFAILED_ALLOCATION);
  } catch (const std::invalid_argument& error) {
    Report(who, error.what(), recorder, ErrorCode::kINVALID_ARGUMENT);
  } catch (const std::exception& error) {
    Report(who, error.what(), recorder, ErrorCode::kFAILED_EXECUTION);
  } catch (...) {
    Report(who, "unknown exception", recorder, ErrorCode::kUNSPECIFIED_ERROR);
  }
  return false;
}

// What most of TensorRT's functions return.
template <typename Body>
int32_t Status(const std::string& who, nvinfer1::IErrorRecorder* recorder, const Body& body) noexcept {
  return Guarded(who, recorder, body) ? 0 : 1;
}

}  // namespace longspan::trt

#endif  // LONGSPAN_TENSORRT_MESSAGES_H_
