// A stand-in for the model, to drive the generated line protocol without TensorFlow Lite Micro.
// Two inputs of 100 and 3 bytes, one output of 100: the first input XOR 0x5a, the second added to its first three.
// Like a real inference it destroys its inputs.
#include <cstdio>
#include <cstring>

#include "model_data.h"
#include "port.h"
#include "protocol.h"

namespace {

unsigned char first[100], second[3], result[100], held[103];

bool input(unsigned index, PortcallTensor* found) {
  if (index > 1) return false;
  *found = index == 0 ? PortcallTensor{first, sizeof first} : PortcallTensor{second, sizeof second};
  return true;
}

bool output(unsigned index, PortcallTensor* found) {
  *found = {result, sizeof result};
  return index == 0;
}

bool invoke() {
  for (size_t i = 0; i < sizeof result; ++i) result[i] = first[i] ^ 0x5a;
  for (size_t i = 0; i < sizeof second; ++i) result[i] = static_cast<unsigned char>(result[i] + second[i]);
  std::memset(first, 0xff, sizeof first);
  std::memset(second, 0xff, sizeof second);
  return result[99] != (0x5a ^ 0xee);  // a last byte of 0xee: the inference fails
}

size_t arena_used() { return 4321; }

bool read_line(char* line, size_t size) { return std::fgets(line, static_cast<int>(size), stdin) != nullptr; }

void write_line(const char* line) {
  std::puts(line);
  std::fflush(stdout);
}

}  // namespace

int main() {
  portcall_setup();
  const PortcallModel model = {portcall_model, portcall_model_bytes, 5000, 2, 1, input, output, invoke, arena_used};
  const PortcallPort port = {read_line, write_line, portcall_ticks, portcall_ticks_per_second, held, sizeof held};
  return portcall_serve(model, port);
}
