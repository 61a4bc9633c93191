// Stands in for libcudart.so.13 under torch: one GPU whose memory is host memory and whose time is virtual.
//
// It keeps ranges of memory, streams, events and captures, and enforces what CUDA's documentation says of them: what a
// capture forbids, which waits join one, what may be registered, copied and freed. What breaks a rule is an error of
// CUDA's, and a line of the file that SIMULATED_GPU_LOG names. It runs no kernel and no operator: these are told to it
// as work that takes some time of a stream (simulated_submit), and it calls back when the host waits, so that what
// ends until then is run. What torch asks for beside the functions here is refused: build.py adds a function for each.

#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <mutex>
#include <set>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace simulated {

constexpr size_t kMemory = 84'000'000'000;

struct Stream;
using Clock = std::map<Stream*, long>;  // of each stream, after how many of its nodes something comes

struct Capture {
  long id;
  cudaStreamCaptureMode mode;
  bool invalid = false;
  long nodes = 0;
  Clock given;                     // nodes of each stream
  std::map<Stream*, Clock> after;  // what each stream comes after
};

struct Stream {
  Capture* capture = nullptr;
  double until = 0;  // when the work that it was given ends
};

struct Event {
  bool timed = true;
  double at = 0;
  Capture* capture = nullptr;  // in which it was last recorded; external records are none
  Clock clock;
};

enum Told { kUntil = 0, kRecord, kWait, kRecordOutside, kWaitOutside, kCopy, kSet };
using Callback = void (*)(int what, void* stream, void* to, const void* from, size_t bytes, double at);

enum Kind { kPageable = 0, kHost = 1, kDevice = 2 };

inline std::recursive_mutex mutex;
inline Callback callback = nullptr;
inline double host = 0;  // the host's time
inline Stream legacy, per_thread;
inline std::set<Stream*> streams{&legacy, &per_thread};
inline std::map<const char*, size_t> on_device, pinned, registered;
inline std::set<Capture*> capturing;
inline long captures = 0;
inline size_t used = 0;
inline thread_local cudaError_t last = cudaSuccess;
inline thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

using Lock = std::lock_guard<std::recursive_mutex>;

cudaError_t fail(cudaError_t error, const char* what);
bool forbidden(const char* what);
void host_waits(double at);
Kind kind_of(const void* address);
bool leaves_registration(const void* address, size_t bytes);

#define REFUSED_IN_CAPTURES \
  if (forbidden(__func__)) return last

inline Stream* stream_of(void* handle) {
  if (!handle || handle == cudaStreamLegacy) return &legacy;
  return handle == cudaStreamPerThread ? &per_thread : static_cast<Stream*>(handle);
}

inline double now(Stream* stream) { return std::max(stream->until, host); }

inline double latest() {
  double at = host;
  for (auto stream : streams) at = std::max(at, stream->until);
  return at;
}

inline void tell(Told what, void* stream, void* to, const void* from = nullptr, size_t bytes = 0) {
  if (callback) callback(what, stream, to, from, bytes, 0);
}

inline void add_node(Stream* stream) {
  Lock lock(mutex);
  if (auto capture = stream->capture) {
    capture->nodes++;
    capture->after[stream][stream] = ++capture->given[stream];
  }
}

}  // namespace simulated

using namespace simulated;
