// Written from the public API of TensorFlow Lite Micro for compile tests: declarations only, linking unproven.
#ifndef PORTCALL_TESTS_TFLM_COMMON_H_
#define PORTCALL_TESTS_TFLM_COMMON_H_

#include <cstddef>
#include <cstdint>

typedef enum TfLiteStatus { kTfLiteOk = 0, kTfLiteError = 1 } TfLiteStatus;

typedef union TfLitePtrUnion {
  int8_t* int8;
  float* f;
  void* data;
} TfLitePtrUnion;

typedef struct TfLiteTensor {
  TfLitePtrUnion data;
  size_t bytes;
} TfLiteTensor;

#endif  // PORTCALL_TESTS_TFLM_COMMON_H_
