// Written from the public API of TensorFlow Lite Micro for compile tests: declarations only, linking unproven.
#ifndef PORTCALL_TESTS_TFLM_MICRO_OP_RESOLVER_H_
#define PORTCALL_TESTS_TFLM_MICRO_OP_RESOLVER_H_

namespace tflite {

class MicroOpResolver {
 public:
  virtual ~MicroOpResolver() {}
};

}  // namespace tflite

#endif  // PORTCALL_TESTS_TFLM_MICRO_OP_RESOLVER_H_
