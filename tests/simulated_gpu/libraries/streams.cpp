// Streams, events, captures and graphs.

#include "runtime.h"


namespace {

void come_after(Clock& mine, const Clock& other) {
  for (auto [stream, count] : other) mine[stream] = std::max(mine[stream], count);
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
