// What Python tells and asks, and what every part needs: errors, the host's time, what captures forbid.

#include "runtime.h"

#include <cstdio>
#include <cstdlib>

namespace simulated {

static void log(const char* text, long number) {
  const char* path = getenv("SIMULATED_GPU_LOG");
  if (FILE* file = path ? fopen(path, "a") : nullptr) {
    fprintf(file, "%s %ld\n", text, number);
    fclose(file);
  }
}

cudaError_t fail(cudaError_t error, const char* what) {
  log(what, error);
  return last = error;
}

// The host waits until then: what ends by that time is run, without the lock, since it calls this library too.
void host_waits(double at) {
  {
    Lock lock(mutex);
    host = std::max(host, at);
    at = host;
  }
  if (callback) callback(kUntil, nullptr, nullptr, nullptr, 0, at);
}

// Whether a capture forbids a call that could wait for the GPU: a global one does for every thread that did not relax.
bool forbidden(const char* what) {
  Lock lock(mutex);
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  for (auto capture : capturing)
    if (capture->mode == cudaStreamCaptureModeGlobal) {
      capture->invalid = true;
      fail(cudaErrorStreamCaptureUnsupported, what);
      return true;
    }
  return false;
}

}  // namespace simulated

EXPORT int simulated_refuse(const char* name) { return fail(cudaErrorNotSupported, name); }

EXPORT void simulated_set_callback(Callback function) { callback = function; }

// Work of `cost` on a stream; returns when it ends. Giving it takes the host a unit of time.
EXPORT double simulated_submit(void* handle, double cost) {
  Lock lock(mutex);
  auto stream = stream_of(handle);
  host += 1;
  return stream->until = now(stream) + cost;
}

EXPORT double simulated_now(void* handle) {
  Lock lock(mutex);
  return now(stream_of(handle));
}

EXPORT void simulated_set_until(void* handle, double at) {
  Lock lock(mutex);
  stream_of(handle)->until = at;
}

EXPORT void simulated_wait(double at) { host_waits(at); }

EXPORT double simulated_event(void* event) {
  Lock lock(mutex);
  return static_cast<Event*>(event)->at;
}

EXPORT void simulated_set_event(void* event, double at) {
  Lock lock(mutex);
  static_cast<Event*>(event)->at = at;
}

EXPORT void simulated_add_node(void* stream) { add_node(stream_of(stream)); }
EXPORT int simulated_kind(const void* address) { return kind_of(address); }
EXPORT int simulated_leaves_registration(const void* address, size_t bytes) {
  return leaves_registration(address, bytes);
}

// First addresses and sizes of the host's ranges that kernels may touch; returns how many there are.
EXPORT long simulated_host_ranges(unsigned long long* found, long most) {
  Lock lock(mutex);
  long count = 0;
  for (auto ranges : {&pinned, &registered})
    for (auto [address, size] : *ranges) {
      if (count < most) found[2 * count] = reinterpret_cast<unsigned long long>(address), found[2 * count + 1] = size;
      count++;
    }
  return count;
}
