// What GCC calls before every load and store of a kernel (-fsanitize=thread, linked without its library), where an address is not
// as aligned as its type or an index is outside its array (-fsanitize=alignment,bounds), and in place of memcpy and its like.
#include "machine.h"

namespace {

using kernelpress::simt::Access;
using kernelpress::simt::machine;

inline void check(const void* address, size_t bytes, Access access, const void* caller) {
  if (kernelpress::simt::is_on_stack(address) || machine.current == nullptr) return;
  kernelpress::simt::check_access(address, bytes, access, caller);
}

// The start of what GCC hands to each __ubsan handler.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeDescription {
  uint16_t kind, info;
  char name[];
};

struct TypeMismatch {
  SourceLocation location;
  const TypeDescription* type;
  unsigned char log_alignment, kind;
};

struct OutOfBounds {
  SourceLocation location;
  const TypeDescription *array, *index;
};

std::string text_of(const SourceLocation& location) { return std::string(location.file) + ":" + std::to_string(location.line); }

}  // namespace

#define KERNELPRESS_HOOK(bytes)                                                                                              \
  void __tsan_read##bytes(void* address) { check(address, bytes, Access::read, __builtin_return_address(0)); }               \
  void __tsan_write##bytes(void* address) { check(address, bytes, Access::write, __builtin_return_address(0)); }             \
  void __tsan_unaligned_read##bytes(void* address) { check(address, bytes, Access::read, __builtin_return_address(0)); }     \
  void __tsan_unaligned_write##bytes(void* address) { check(address, bytes, Access::write, __builtin_return_address(0)); }

extern "C" {

KERNELPRESS_HOOK(1)
KERNELPRESS_HOOK(2)
KERNELPRESS_HOOK(4)
KERNELPRESS_HOOK(8)
KERNELPRESS_HOOK(16)

void __tsan_init() {}
void __tsan_read_range(void* address, size_t bytes) { check(address, bytes, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* address, size_t bytes) { check(address, bytes, Access::write, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t address) {
  if (machine.current == nullptr) return;
  kernelpress::simt::fail(std::string("misaligned: ") + data->type->name + " at " + text_of(data->location) + ", expected a multiple of " +
                              std::to_string(1u << data->log_alignment) + " bytes, got an address that is " +
                              std::to_string(address % (size_t{1} << data->log_alignment)) + " above one",
                          __builtin_return_address(0));
}

void __ubsan_handle_out_of_bounds(const OutOfBounds* data, uintptr_t index) {
  if (machine.current == nullptr) return;
  kernelpress::simt::fail("out of bounds: index " + std::to_string(static_cast<intptr_t>(index)) + " of " + data->array->name + " at " +
                              text_of(data->location),
                          __builtin_return_address(0));
}

void* kernelpress_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes != 0) check(from, bytes, Access::read, __builtin_return_address(0));
  if (bytes != 0) check(to, bytes, Access::write, __builtin_return_address(0));
  return std::memcpy(to, from, bytes);
}

void* kernelpress_memmove(void* to, const void* from, size_t bytes) {
  if (bytes != 0) check(from, bytes, Access::read, __builtin_return_address(0));
  if (bytes != 0) check(to, bytes, Access::write, __builtin_return_address(0));
  return std::memmove(to, from, bytes);
}

void* kernelpress_memset(void* to, int value, size_t bytes) {
  if (bytes != 0) check(to, bytes, Access::write, __builtin_return_address(0));
  return std::memset(to, value, bytes);
}

}  // extern "C"
