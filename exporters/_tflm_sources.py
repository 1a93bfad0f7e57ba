"""The firmware that goes with an artifact, as text: a line protocol, its connection to TFLM, and how to build it.

Long because it is the C++ itself. ``protocol`` knows nothing of TFLM, so that it can be built and driven on a host.
Written from TFLM's public API (``MicroInterpreter``, ``MicroMutableOpResolver``, ``GetModel``).
"""

from __future__ import annotations

PROTOCOL_H = """// A line protocol to measure a model over stdio or semihosting. It knows nothing of TFLM.
#ifndef PORTCALL_PROTOCOL_H_
#define PORTCALL_PROTOCOL_H_

#include <cstddef>
#include <cstdint>

struct PortcallTensor {
  unsigned char* data;
  size_t bytes;
};

// The model as the protocol sees it. Functions that return bool return false on failure.
struct PortcallModel {
  const unsigned char* flatbuffer;
  size_t flatbuffer_bytes;
  size_t arena_bytes;
  unsigned inputs;
  unsigned outputs;
  bool (*input)(unsigned index, PortcallTensor* found);
  bool (*output)(unsigned index, PortcallTensor* found);
  bool (*invoke)();
  size_t (*arena_used)();
};

// Where lines come from and go to. read_line: as fgets, false at the end. write_line: without a line end in the text.
// held: as many bytes as all inputs together; an inference may overwrite its inputs, so that run puts them back.
struct PortcallPort {
  bool (*read_line)(char* line, size_t size);
  void (*write_line)(const char* line);
  uint32_t (*ticks)();
  uint32_t (*ticks_per_second)();
  unsigned char* held;
  size_t held_bytes;
};

// Answer commands until "quit" or the end of the input. Every answer ends in a line "ok" or "error REASON".
//   info                  what is here: sizes, arena, tensors
//   input I OFFSET HEX    set bytes of input I
//   run N                 N inferences, a line "ticks T" for each (the timer's wrap-around is taken out)
//   output I [OFFSET N]   a line "output I OFFSET HEX" for every 64 bytes
//   crc I                 CRC-32 (as zlib's) of output I
//   quit
int portcall_serve(const PortcallModel& model, const PortcallPort& port);

uint32_t portcall_crc32(const unsigned char* data, size_t bytes);

#endif  // PORTCALL_PROTOCOL_H_
"""

PROTOCOL_CC = r"""#include "protocol.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr size_t kLine = 1100;  // holds 512 bytes as hex
constexpr size_t kChunk = 64;

using Find = bool (*)(unsigned, PortcallTensor*);

class Server {
 public:
  Server(const PortcallModel& model, const PortcallPort& port) : model_(model), port_(port) {}

  int serve() {
    if (!hold()) return 1;
    while (port_.read_line(line_, sizeof line_)) {
      char* command = std::strtok(line_, " \t\r\n");
      if (command == nullptr) continue;
      if (std::strcmp(command, "quit") == 0) return ok(), 0;
      answer(command);
    }
    return 0;
  }

 private:
  // The inputs as they are at first: zeros, or whatever the arena holds.
  bool hold() {
    size_t used = 0;
    for (unsigned i = 0; i < model_.inputs; ++i) {
      PortcallTensor tensor;
      if (!model_.input(i, &tensor) || tensor.bytes > port_.held_bytes - used) {
        error("inputs larger than PORTCALL_INPUT_BYTES");
        return false;
      }
      std::memset(port_.held + used, 0, tensor.bytes);
      used += tensor.bytes;
    }
    return true;
  }

  void answer(const char* command) {
    if (std::strcmp(command, "info") == 0) {
      info();
    } else if (std::strcmp(command, "input") == 0) {
      set_input();
    } else if (std::strcmp(command, "run") == 0) {
      run();
    } else if (std::strcmp(command, "output") == 0) {
      output();
    } else if (std::strcmp(command, "crc") == 0) {
      crc();
    } else {
      error("unknown command; there are: info, input, run, output, crc, quit");
    }
  }

  void info() {
    const unsigned long crc = portcall_crc32(model_.flatbuffer, model_.flatbuffer_bytes);
    std::snprintf(line_, sizeof line_, "portcall 1 model_bytes=%lu model_crc32=%08lx arena=%lu arena_used=%lu "
                  "inputs=%u outputs=%u ticks_per_second=%lu",
                  static_cast<unsigned long>(model_.flatbuffer_bytes), crc,
                  static_cast<unsigned long>(model_.arena_bytes), static_cast<unsigned long>(model_.arena_used()),
                  model_.inputs, model_.outputs, static_cast<unsigned long>(port_.ticks_per_second()));
    port_.write_line(line_);
    describe("input", model_.inputs, model_.input);
    describe("output", model_.outputs, model_.output);
    ok();
  }

  void describe(const char* name, unsigned count, Find find) {
    for (unsigned i = 0; i < count; ++i) {
      PortcallTensor tensor;
      if (!find(i, &tensor)) continue;
      std::snprintf(line_, sizeof line_, "%s %u bytes=%lu", name, i, static_cast<unsigned long>(tensor.bytes));
      port_.write_line(line_);
    }
  }

  void set_input() {
    unsigned long index, offset;
    const char* hex = number(&index) && number(&offset) ? std::strtok(nullptr, " \t\r\n") : nullptr;
    if (hex == nullptr) return error("write: input I OFFSET HEX");
    size_t start = 0;
    PortcallTensor tensor = {nullptr, 0};
    for (unsigned i = 0; i < model_.inputs && i <= index; ++i) {
      if (!model_.input(i, &tensor)) return error("no such input");
      if (i < index) start += tensor.bytes;
    }
    const size_t bytes = std::strlen(hex) / 2;
    if (index >= model_.inputs) return error("no such input");
    if (std::strlen(hex) % 2 || offset > tensor.bytes || bytes > tensor.bytes - offset) {
      return error("outside the input, or half a byte");
    }
    for (size_t i = 0; i < bytes; ++i) {
      const int high = digit(hex[2 * i]), low = digit(hex[2 * i + 1]);
      if (high < 0 || low < 0) return error("not hexadecimal");
      port_.held[start + offset + i] = static_cast<unsigned char>(16 * high + low);
    }
    ok();
  }

  void run() {
    unsigned long count;
    if (!number(&count) || count == 0) return error("write: run N");
    while (count--) {
      const unsigned char* from = port_.held;
      for (unsigned i = 0; i < model_.inputs; ++i) {
        PortcallTensor tensor;
        if (!model_.input(i, &tensor)) return error("no such input");
        std::memcpy(tensor.data, from, tensor.bytes);
        from += tensor.bytes;
      }
      const uint32_t start = port_.ticks();
      const bool done = model_.invoke();
      const uint32_t ticks = port_.ticks() - start;
      if (!done) return error("the inference failed");
      std::snprintf(line_, sizeof line_, "ticks %lu", static_cast<unsigned long>(ticks));
      port_.write_line(line_);
    }
    ok();
  }

  void output() {
    unsigned long index, offset = 0, count;
    PortcallTensor tensor;
    if (!number(&index)) return error("write: output I [OFFSET N]");
    if (index >= model_.outputs || !model_.output(static_cast<unsigned>(index), &tensor)) {
      return error("no such output");
    }
    if (!number(&offset) || !number(&count)) {
      offset = 0;
      count = tensor.bytes;
    }
    if (offset > tensor.bytes || count > tensor.bytes - offset) return error("outside the output");
    for (size_t done = 0; done < count; done += kChunk) {
      const size_t bytes = count - done < kChunk ? count - done : kChunk;
      int at = std::snprintf(line_, sizeof line_, "output %lu %lu ", index, offset + done);
      for (size_t i = 0; i < bytes; ++i) {
        at += std::snprintf(line_ + at, sizeof line_ - at, "%02x", tensor.data[offset + done + i]);
      }
      port_.write_line(line_);
    }
    ok();
  }

  void crc() {
    unsigned long index;
    PortcallTensor tensor;
    if (!number(&index)) return error("write: crc I");
    if (index >= model_.outputs || !model_.output(static_cast<unsigned>(index), &tensor)) {
      return error("no such output");
    }
    const unsigned long crc = portcall_crc32(tensor.data, tensor.bytes);
    std::snprintf(line_, sizeof line_, "crc %lu %08lx", index, crc);
    port_.write_line(line_);
    ok();
  }

  static bool number(unsigned long* value) {
    const char* word = std::strtok(nullptr, " \t\r\n");
    if (word == nullptr || *word < '0' || *word > '9') return false;
    char* end;
    *value = std::strtoul(word, &end, 10);
    return *end == '\0';
  }

  static int digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
  }

  void ok() { port_.write_line("ok"); }

  void error(const char* reason) {
    std::snprintf(line_, sizeof line_, "error %s", reason);
    port_.write_line(line_);
  }

  const PortcallModel& model_;
  const PortcallPort& port_;
  char line_[kLine];
};

}  // namespace

int portcall_serve(const PortcallModel& model, const PortcallPort& port) { return Server(model, port).serve(); }

uint32_t portcall_crc32(const unsigned char* data, size_t bytes) {
  uint32_t crc = 0xffffffffu;
  for (size_t i = 0; i < bytes; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0xedb88320u : 0);
  }
  return ~crc;
}
"""

PORT_H = """// What a board may replace: a timer, and what it does first. Weak functions: define your own.
#ifndef PORTCALL_PORT_H_
#define PORTCALL_PORT_H_

#include <cstdint>

// A free-running counter that wraps at 2^32. Default: clock() of the C library, a semihosting call: coarse.
// On Cortex-M3 and above the cycle counter is better: enable DWT in portcall_setup, return DWT->CYCCNT.
uint32_t portcall_ticks();
uint32_t portcall_ticks_per_second();

// Called once before anything else: clocks, the UART behind stdio, caches. Default: nothing.
void portcall_setup();

#endif  // PORTCALL_PORT_H_
"""

PORT_CC = """#include "port.h"

#include <ctime>

__attribute__((weak)) uint32_t portcall_ticks() { return static_cast<uint32_t>(std::clock()); }

__attribute__((weak)) uint32_t portcall_ticks_per_second() { return CLOCKS_PER_SEC; }

__attribute__((weak)) void portcall_setup() {}
"""

MAIN_CC = r"""// The model in TensorFlow Lite Micro, driven by the line protocol over stdio (semihosting or a UART).
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "model_data.h"
#include "op_resolver.h"
#include "port.h"
#include "portcall_config.h"
#include "protocol.h"
#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/schema/schema_generated.h"

namespace {

using namespace tflite;         // names are left to both namespaces: TFLM has been
using namespace tflite::micro;  // moving its own from the first into the second

alignas(16) uint8_t arena[PORTCALL_ARENA_BYTES];
unsigned char held[PORTCALL_INPUT_BYTES];
MicroInterpreter* interpreter = nullptr;

template <typename Tensor>
bool found_in(Tensor* tensor, PortcallTensor* found) {
  if (tensor == nullptr) return false;
  found->data = static_cast<unsigned char*>(static_cast<void*>(tensor->data.data));
  found->bytes = tensor->bytes;
  return true;
}

template <typename Status>
bool succeeded(Status status) {
  return static_cast<int>(status) == 0;  // kTfLiteOk
}

bool input(unsigned index, PortcallTensor* found) { return found_in(interpreter->input(index), found); }

bool output(unsigned index, PortcallTensor* found) { return found_in(interpreter->output(index), found); }

bool invoke() { return succeeded(interpreter->Invoke()); }

size_t arena_used() { return interpreter->arena_used_bytes(); }

bool read_line(char* line, size_t size) { return std::fgets(line, static_cast<int>(size), stdin) != nullptr; }

void write_line(const char* line) {
  std::fputs(line, stdout);
  std::fputc('\n', stdout);
  std::fflush(stdout);
}

int fail(const char* reason) {
  write_line(reason);
  return 1;
}

}  // namespace

int main() {
  portcall_setup();
  static PortcallOpResolver resolver;
  if (!portcall_register_ops(resolver)) return fail("error TFLM refused an operator");
  static MicroInterpreter instance(GetModel(portcall_model), resolver, arena, sizeof arena);
  interpreter = &instance;
  if (!succeeded(instance.AllocateTensors())) {
    return fail("error the arena is too small for this TFLM build: raise PORTCALL_ARENA_BYTES");
  }
  const PortcallModel model = {portcall_model, portcall_model_bytes, sizeof arena,
                               static_cast<unsigned>(instance.inputs_size()),
                               static_cast<unsigned>(instance.outputs_size()),
                               input, output, invoke, arena_used};
  const PortcallPort port = {read_line, write_line, portcall_ticks, portcall_ticks_per_second, held, sizeof held};
  return portcall_serve(model, port);
}
"""

MAKEFILE = """# Builds the firmware against your TensorFlow Lite Micro tree:
#   make TFLM_ROOT=/path/to/tflite-micro            (its headers)
#        TFLM_LIB=/path/to/libtensorflow-microlite.a (its library, built for the same core)
# "make objects" compiles without linking. CORE: @CORES@.
CORE ?= @CORE@
CROSS ?= arm-none-eabi-
CXX := $(CROSS)g++

@FLAGS@
ARCH := $(FLAGS_$(CORE))
ifeq ($(ARCH),)
$(error CORE is $(CORE); it takes: @CORES@)
endif
ifeq ($(TFLM_ROOT),)
$(error TFLM_ROOT is not set: the folder that holds tensorflow/lite/micro)
endif

INCLUDES := -I. -isystem $(TFLM_ROOT) -isystem $(TFLM_ROOT)/third_party/flatbuffers/include \\
    -isystem $(TFLM_ROOT)/third_party/gemmlowp
COMPILE := $(ARCH) -mthumb -std=c++17 -Os -Wall -Wextra -fno-exceptions -fno-rtti -fno-threadsafe-statics \\
    -ffunction-sections -fdata-sections -DTF_LITE_STATIC_MEMORY
LINK := $(ARCH) -mthumb -Wl,--gc-sections --specs=rdimon.specs
SOURCES := main.cc protocol.cc port.cc model_data.cc
OBJECTS := $(SOURCES:%.cc=build/%.o)

firmware: build/firmware.elf
objects: $(OBJECTS)

build/%.o: %.cc
\t@mkdir -p build
\t$(CXX) $(COMPILE) $(CXXFLAGS) $(INCLUDES) -c $< -o $@

build/firmware.elf: $(OBJECTS) $(TFLM_LIB)
\t$(if $(TFLM_LIB),,$(error TFLM_LIB is not set: the static library of TFLM for $(CORE)))
\t$(CXX) $(LINK) $(LDFLAGS) $(OBJECTS) $(EXTRA_OBJECTS) $(TFLM_LIB) -o $@

clean:
\trm -rf build

.PHONY: firmware objects clean
"""

CMAKE = """# Builds the firmware against your TensorFlow Lite Micro tree, as the Makefile does:
#   cmake -S . -B build -DCMAKE_SYSTEM_NAME=Generic -DCMAKE_CXX_COMPILER=arm-none-eabi-g++
#         -DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY -DTFLM_ROOT=... -DTFLM_LIB=... [-DCORE=@CORE@]
# Without TFLM_LIB it compiles and does not link. CORE: @CORES@.
cmake_minimum_required(VERSION 3.16)
project(portcall_firmware CXX)

set(CORE @CORE@ CACHE STRING "One of: @CORES@")
set(TFLM_ROOT "" CACHE PATH "The folder that holds tensorflow/lite/micro")
set(TFLM_LIB "" CACHE FILEPATH "The static library of TFLM, built for the same core")
if(NOT TFLM_ROOT)
  message(FATAL_ERROR "TFLM_ROOT is not set: the folder that holds tensorflow/lite/micro")
endif()

@FLAGS@
if(NOT DEFINED FLAGS_${CORE})
  message(FATAL_ERROR "CORE is ${CORE}; it takes: @CORES@")
endif()

add_library(portcall_objects OBJECT main.cc protocol.cc port.cc model_data.cc)
target_compile_features(portcall_objects PRIVATE cxx_std_17)
target_compile_definitions(portcall_objects PRIVATE TF_LITE_STATIC_MEMORY)
target_include_directories(portcall_objects PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
target_include_directories(portcall_objects SYSTEM PRIVATE ${TFLM_ROOT}
  ${TFLM_ROOT}/third_party/flatbuffers/include ${TFLM_ROOT}/third_party/gemmlowp)
target_compile_options(portcall_objects PRIVATE ${FLAGS_${CORE}} -mthumb -Os -Wall -Wextra -fno-exceptions -fno-rtti
  -fno-threadsafe-statics -ffunction-sections -fdata-sections)
if(TFLM_LIB)
  add_executable(firmware $<TARGET_OBJECTS:portcall_objects>)
  target_link_options(firmware PRIVATE ${FLAGS_${CORE}} -mthumb -Wl,--gc-sections --specs=rdimon.specs)
  target_link_libraries(firmware PRIVATE ${TFLM_LIB})
endif()
"""
