// Stands in for libcudart.so.13 under torch: one GPU whose memory is host memory and whose time is virtual.
//
// It keeps ranges of memory, streams, events and captures, and enforces what CUDA's documentation says of them: what a
// capture forbids, which waits join one, what may be registered, copied and freed. What breaks a rule is an error of
// CUDA's, and a line of the file that SIMULATED_GPU_LOG names. It runs no kernel and no operator: these are told to it
// as work that takes some time of a stream (simulated_submit), and it calls back when the host waits, so that what
// ends until then is run. What torch asks for beside the functions here is refused: build.py adds a function for each.

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t kMemory = 84'000'000'000;
constexpr size_t kBehind = 4096;  // bytes mapped behind an allocation, which vector code of the CPU may read

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

std::recursive_mutex mutex;
Callback callback = nullptr;
double host = 0;  // the host's time
Stream legacy, per_thread;
std::set<Stream*> streams{&legacy, &per_thread};
std::map<const char*, size_t> on_device, pinned, registered;
std::set<Capture*> capturing;
long captures = 0;
size_t used = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

using Lock = std::lock_guard<std::recursive_mutex>;

void log(const char* text, long number) {
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

Stream* stream_of(void* handle) {
  if (!handle || handle == cudaStreamLegacy) return &legacy;
  return handle == cudaStreamPerThread ? &per_thread : static_cast<Stream*>(handle);
}

double now(Stream* stream) { return std::max(stream->until, host); }

double latest() {
  double at = host;
  for (auto stream : streams) at = std::max(at, stream->until);
  return at;
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

void tell(Told what, void* stream, void* to, const void* from = nullptr, size_t bytes = 0) {
  if (callback) callback(what, stream, to, from, bytes, 0);
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

#define REFUSED_IN_CAPTURES \
  if (forbidden(__func__)) return last

void add_node(Stream* stream) {
  Lock lock(mutex);
  if (auto capture = stream->capture) {
    capture->nodes++;
    capture->after[stream][stream] = ++capture->given[stream];
  }
}

void come_after(Clock& mine, const Clock& other) {
  for (auto [stream, count] : other) mine[stream] = std::max(mine[stream], count);
}

// The range that an address lies in, or end().
template <class Ranges>
auto range_of(Ranges& ranges, const void* address) {
  auto next = ranges.upper_bound(static_cast<const char*>(address));
  if (next == ranges.begin()) return ranges.end();
  --next;
  return static_cast<const char*>(address) < next->first + next->second ? next : ranges.end();
}

enum Kind { kPageable = 0, kHost = 1, kDevice = 2 };

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

cudaError_t wait_in_captures(Stream* stream, Event* event, bool external) {
  Lock lock(mutex);
  auto capture = stream->capture;
  if (external) {
    if (!capture) return fail(cudaErrorInvalidValue, "an external wait outside of a capture");
    add_node(stream);
    return cudaSuccess;
  }
  if (!event->capture) {
    if (!capture || !event->at) return cudaSuccess;
    capture->invalid = true;
    return fail(cudaErrorStreamCaptureIsolation, "a capture waits for an event of outside");
  }
  if (!capturing.count(event->capture)) return fail(cudaErrorCapturedEvent, "a wait for an event of an ended capture");
  if (capture && capture != event->capture) {
    capture->invalid = true;
    return fail(cudaErrorStreamCaptureMerge, "a wait merges two captures");
  }
  if (stream == &legacy) return fail(cudaErrorStreamCaptureImplicit, "the legacy stream joins a capture");
  stream->capture = event->capture;
  stream->capture->given.emplace(stream, 0);
  come_after(stream->capture->after[stream], event->clock);
  return cudaSuccess;
}

}  // namespace

// ---------------------------------------------------------------------------------- what Python tells and asks

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

// -------------------------------------------------------------------------------------------------- the device

EXPORT cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int) { return cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
  snprintf(text, size, "0000:00:00.0");
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  strcpy(properties->name, "simulated GPU (sm_90)");
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->totalGlobalMem = kMemory;
  properties->l2CacheSize = 50 << 20;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxBlocksPerMultiProcessor = 32;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->unifiedAddressing = properties->canMapHostMemory = properties->concurrentKernels = 1;
  properties->textureAlignment = 512;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> known = {
      {cudaDevAttrMultiProcessorCount, 132},     {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrComputeCapabilityMajor, 9},    {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxGridDimX, 2147483647},      {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535},           {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
      {cudaDevAttrWarpSize, 32},                 {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
  };
  auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceSynchronize() {
  REFUSED_IN_CAPTURES;
  host_waits(latest());
  return cudaSuccess;
}

EXPORT cudaError_t cudaGetLastError() {
  auto error = last;
  last = cudaSuccess;
  return error;
}

EXPORT cudaError_t cudaPeekAtLastError() { return last; }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[48];
  snprintf(text, sizeof text, "error %d of CUDA's, on a simulated GPU", error);
  return text;
}
EXPORT const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// -------------------------------------------------------------------------------------------------- memory

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

// -------------------------------------------------------------------------------------------------- streams, events

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned, int) {
  Lock lock(mutex);
  auto stream = new Stream;  // never freed: torch keeps its streams in a pool
  streams.insert(stream);
  *handle = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t* handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  REFUSED_IN_CAPTURES;
  Lock lock(mutex);
  return stream_of(handle)->until > host ? last = cudaErrorNotReady : cudaSuccess;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  REFUSED_IN_CAPTURES;
  host_waits(now(stream_of(handle)));
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned flags) {
  auto stream = stream_of(handle);
  auto event = reinterpret_cast<Event*>(event_handle);
  bool external = flags & cudaEventWaitExternal;
  if (auto error = wait_in_captures(stream, event, external)) return error;
  if (stream->capture) {
    tell(external ? kWaitOutside : kWait, handle, event_handle);
    return cudaSuccess;
  }
  Lock lock(mutex);
  stream->until = std::max(stream->until, event->at);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  auto event = new Event;  // never freed: a graph may know it
  event->timed = !(flags & cudaEventDisableTiming);
  *handle = reinterpret_cast<cudaEvent_t>(event);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned flags) {
  auto stream = stream_of(stream_handle);
  auto event = reinterpret_cast<Event*>(handle);
  bool external = flags & cudaEventRecordExternal;
  {
    Lock lock(mutex);
    if (external && !stream->capture) return fail(cudaErrorInvalidValue, "an external record outside of a capture");
    if (external) {
      add_node(stream);
    } else if ((event->capture = stream->capture)) {
      event->clock = stream->capture->after[stream];
    } else {
      event->at = now(stream);
    }
    if (!stream->capture) return cudaSuccess;
  }
  tell(external ? kRecordOutside : kRecord, stream_handle, handle);
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
  return cudaEventRecordWithFlags(handle, stream, 0);
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  REFUSED_IN_CAPTURES;
  Lock lock(mutex);
  auto event = reinterpret_cast<Event*>(handle);
  if (event->capture) return fail(cudaErrorCapturedEvent, __func__);
  return event->at > host ? last = cudaErrorNotReady : cudaSuccess;
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  REFUSED_IN_CAPTURES;
  auto event = reinterpret_cast<Event*>(handle);
  if (event->capture) return fail(cudaErrorCapturedEvent, __func__);
  host_waits(event->at);
  return cudaSuccess;
}

// A unit of time is a microsecond, and no two events are at the same time.
EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  auto first = reinterpret_cast<Event*>(start), second = reinterpret_cast<Event*>(end);
  if (!first->timed || !second->timed) return fail(cudaErrorInvalidResourceHandle, __func__);
  *milliseconds = static_cast<float>((second->at - first->at) * 1e-3 + 1e-4);
  return cudaSuccess;
}

// -------------------------------------------------------------------------------------------------- captures, graphs

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(thread_mode, *mode);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(mutex);
  auto stream = stream_of(handle);
  if (stream == &legacy) return fail(cudaErrorStreamCaptureUnsupported, "a capture of the legacy stream");
  if (stream->capture) return fail(cudaErrorIllegalState, "a capture of a stream that is captured");
  stream->capture = new Capture{++captures, mode};  // never freed: events and graphs know it
  stream->capture->given[stream] = 0;
  capturing.insert(stream->capture);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Lock lock(mutex);
  auto stream = stream_of(handle);
  auto capture = stream->capture;
  *graph = nullptr;
  if (!capture) return fail(cudaErrorIllegalState, "the end of no capture");
  capturing.erase(capture);
  for (auto each : streams)
    if (each->capture == capture) each->capture = nullptr;
  if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated, "the end of a capture that a call broke");
  auto& joined = capture->after[stream];
  for (auto [other, count] : capture->given)
    if (joined[other] < count) return fail(cudaErrorStreamCaptureUnjoined, "work of a capture has not joined its end");
  *graph = reinterpret_cast<cudaGraph_t>(capture);
  return cudaSuccess;
}

cudaStreamCaptureStatus status_of(Capture* capture) {
  if (!capture) return cudaStreamCaptureStatusNone;
  return capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock(mutex);
  *status = status_of(stream_of(handle)->capture);
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                            size_t* count) {
  Lock lock(mutex);
  auto capture = stream_of(handle)->capture;
  *status = status_of(capture);
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture);
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

// Replays are Python's, which knows what was captured.
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Capture*>(graph)->nodes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// -------------------------------------------------------------------------------------------------- kernels of torch's

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction() {}
EXPORT void __cudaRegisterVar() {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
EXPORT cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* entry) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(entry));
  return cudaSuccess;
}

// Operators run on the CPU before they come here: one that does not is refused rather than left out.
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return fail(cudaErrorNoKernelImageForDevice, "a kernel of torch's own");
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  return fail(cudaErrorNoKernelImageForDevice, "a kernel of torch's own");
}

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}
