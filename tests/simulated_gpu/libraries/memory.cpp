// Memory of the device and of the host, and copies.

#include "runtime.h"

#include <sys/mman.h>
#include <cstring>

namespace simulated {

// The range that an address lies in, or end().
template <class Ranges>
auto range_of(Ranges& ranges, const void* address) {
  auto next = ranges.upper_bound(static_cast<const char*>(address));
  if (next == ranges.begin()) return ranges.end();
  --next;
  return static_cast<const char*>(address) < next->first + next->second ? next : ranges.end();
}

Kind kind_of(const void* address) {
  Lock lock(mutex);
  if (range_of(on_device, address) != on_device.end()) return kDevice;
  bool known = range_of(pinned, address) != pinned.end() || range_of(registered, address) != registered.end();
  return known ? kHost : kPageable;
}

// A copy whose one end leaves a registration is an invalid value, into another registration too.
bool leaves_registration(const void* address, size_t bytes) {
  Lock lock(mutex);
  auto range = range_of(registered, address);
  return range != registered.end() && static_cast<const char*>(address) + bytes > range->first + range->second;
}

}  // namespace simulated

namespace {

constexpr size_t kBehind = 4096;  // bytes mapped behind an allocation, which vector code of the CPU may read

void* map_memory(size_t bytes) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  return mmap(nullptr, bytes + kBehind, PROT_READ | PROT_WRITE, flags, -1, 0);
}

template <class Ranges>
cudaError_t free_range(Ranges& ranges, void* address, const char* what) {
  Lock lock(mutex);
  auto range = ranges.find(static_cast<const char*>(address));
  if (range == ranges.end()) return fail(cudaErrorInvalidValue, what);
  munmap(address, range->second + kBehind);
  ranges.erase(range);
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t handle) {
  auto stream = stream_of(handle);
  for (auto end : {static_cast<const void*>(to), from})
    if (leaves_registration(end, bytes)) return fail(cudaErrorInvalidValue, "a copy across registrations");
  if (stream->capture) {
    if (kind_of(to) == kPageable || kind_of(from) == kPageable) {
      stream->capture->invalid = true;
      return fail(cudaErrorStreamCaptureUnsupported, "a copy of pageable memory in a capture");
    }
    add_node(stream);
    tell(kCopy, handle, to, from, bytes);
    return cudaSuccess;
  }
  host_waits(now(stream));
  memmove(to, from, bytes);
  return cudaSuccess;
}

}  // namespace

EXPORT cudaError_t cudaMalloc(void** address, size_t bytes) {
  REFUSED_IN_CAPTURES;
  Lock lock(mutex);
  if (used + bytes > kMemory) return last = cudaErrorMemoryAllocation;
  *address = map_memory(bytes);
  if (*address == MAP_FAILED) return fail(cudaErrorMemoryAllocation, __func__);
  on_device[static_cast<char*>(*address)] = bytes;
  used += bytes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFree(void* address) {
  if (!address) return cudaSuccess;
  REFUSED_IN_CAPTURES;
  host_waits(latest());
  Lock lock(mutex);
  auto range = on_device.find(static_cast<char*>(address));
  if (range != on_device.end()) used -= range->second;
  return free_range(on_device, address, __func__);
}

EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Lock lock(mutex);
  *free = kMemory - used;
  *total = kMemory;
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  REFUSED_IN_CAPTURES;
  Lock lock(mutex);
  *address = map_memory(bytes);
  if (*address == MAP_FAILED) return fail(cudaErrorMemoryAllocation, __func__);
  pinned[static_cast<char*>(*address)] = bytes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void* address) {
  REFUSED_IN_CAPTURES;
  host_waits(latest());
  return free_range(pinned, address, __func__);
}

EXPORT cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  REFUSED_IN_CAPTURES;
  Lock lock(mutex);
  auto first = static_cast<char*>(address);
  for (auto [start, size] : registered)
    if (first < start + size && start < first + bytes) return fail(cudaErrorHostMemoryAlreadyRegistered, __func__);
  registered[first] = bytes;
  return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void* address) {
  REFUSED_IN_CAPTURES;
  host_waits(latest());
  Lock lock(mutex);
  return registered.erase(static_cast<char*>(address)) ? cudaSuccess : fail(cudaErrorHostMemoryNotRegistered, __func__);
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  static const cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
  auto kind = kind_of(address);
  *attributes = {};
  attributes->type = types[kind];
  attributes->devicePointer = kind == kPageable ? nullptr : const_cast<void*>(address);
  attributes->hostPointer = kind == kHost ? const_cast<void*>(address) : nullptr;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, bytes, stream);
}

EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  REFUSED_IN_CAPTURES;
  host_waits(latest());
  return copy(to, from, bytes, nullptr);
}

EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t handle) {
  auto stream = stream_of(handle);
  if (stream->capture) {
    add_node(stream);
    tell(kSet, handle, to, reinterpret_cast<void*>(static_cast<size_t>(value & 255)), bytes);
    return cudaSuccess;
  }
  host_waits(now(stream));
  memset(to, value, bytes);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }
