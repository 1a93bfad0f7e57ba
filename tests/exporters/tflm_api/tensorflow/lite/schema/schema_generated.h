// Written from the public API of TensorFlow Lite Micro for compile tests: declarations only, linking unproven.
#ifndef PORTCALL_TESTS_TFLM_SCHEMA_H_
#define PORTCALL_TESTS_TFLM_SCHEMA_H_

namespace tflite {

struct Model;
const Model* GetModel(const void* buffer);

}  // namespace tflite

#endif  // PORTCALL_TESTS_TFLM_SCHEMA_H_
