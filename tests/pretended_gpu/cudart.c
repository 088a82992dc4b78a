/* A CUDA runtime without a GPU: two devices, whose memory is the host's.

   torch's own allocator, streams, events and graphs run on it (LD_PRELOAD). It computes nothing: what torch and Triton
   would launch is done by the Python files beside this one, and a kernel of CUDA itself ends the process. As a driver it
   answers what torch asks before its first launch. */
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

_Static_assert(CUDART_VERSION / 1000 == 13, "functions and structures of CUDA 13");
enum { DEVICES = 2, TOTAL_GIB = 8, MULTIPROCESSORS = 4, PAGE = 4096, MOST_STREAMS = 64 };

/* --- the devices ------------------------------------------------------------------------------------------------ */

static __thread int current;

cudaError_t cudaGetDeviceCount(int *count) { *count = DEVICES; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= DEVICES) return cudaErrorInvalidDevice;
    current = device;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "pretended GPU");
    found->major = 9; /* a Hopper */
    found->multiProcessorCount = MULTIPROCESSORS;
    found->totalGlobalMem = (size_t)TOTAL_GIB << 30;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    found->sharedMemPerBlock = 48 << 10;
    found->sharedMemPerBlockOptin = 227 << 10;
    found->sharedMemPerMultiprocessor = 228 << 10;
    found->regsPerMultiprocessor = 65536;
    found->l2CacheSize = 50 << 20;
    return cudaSuccess;
}

/* --- memory: an address is never given twice, and what was given back can be neither read nor written --------------- */

typedef struct Block {
    void *begin;
    size_t bytes;
    int device;
    struct Block *next;
} Block;
static Block *on_device, *on_host;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic size_t taken[DEVICES];

static cudaError_t take(Block **blocks, void **begin, size_t bytes) {
    Block *block = malloc(sizeof *block);
    block->device = current;
    block->bytes = (bytes + PAGE - 1) & ~(size_t)(PAGE - 1);
    *begin = mmap(0, block->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if ((block->begin = *begin) == MAP_FAILED) {
        free(block);
        return cudaErrorMemoryAllocation;
    }
    pthread_mutex_lock(&lock);
    block->next = *blocks;
    *blocks = block;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static size_t give_back(Block **blocks, void *begin, int *device) {
    size_t bytes = 0;
    pthread_mutex_lock(&lock);
    for (Block **at = blocks; *at && !bytes; )
        if ((*at)->begin == begin) {
            Block *block = *at;
            bytes = block->bytes;
            *device = block->device;
            *at = block->next;
            free(block);
        } else
            at = &(*at)->next;
    pthread_mutex_unlock(&lock);
    if (bytes) mmap(begin, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return bytes;
}

static Block *holding(Block *block, const char *address) {
    while (block && (address < (char *)block->begin || address >= (char *)block->begin + block->bytes)) block = block->next;
    return block;
}

cudaError_t cudaMalloc(void **begin, size_t bytes) {
    if (taken[current] + bytes > (size_t)TOTAL_GIB << 30) return cudaErrorMemoryAllocation;
    cudaError_t status = take(&on_device, begin, bytes);
    if (status == cudaSuccess) {
        memset(*begin, 0xAB, bytes); /* nothing relies on zeros */
        taken[current] += (bytes + PAGE - 1) & ~(size_t)(PAGE - 1);
    }
    return status;
}
cudaError_t cudaFree(void *begin) {
    int device = 0;
    size_t bytes = give_back(&on_device, begin, &device);
    taken[device] -= bytes;
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **begin, size_t bytes, unsigned flags) { return take(&on_host, begin, bytes); }
cudaError_t cudaFreeHost(void *begin) {
    int device;
    give_back(&on_host, begin, &device);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *total = (size_t)TOTAL_GIB << 30;
    *left = *total - taken[current];
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address) {
    memset(found, 0, sizeof *found);
    pthread_mutex_lock(&lock);
    Block *block = holding(on_device, address), *pinned = block ? 0 : holding(on_host, address);
    found->type = block ? cudaMemoryTypeDevice : pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    found->device = block ? block->device : pinned ? pinned->device : current;
    pthread_mutex_unlock(&lock);
    found->devicePointer = found->hostPointer = (void *)address;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    memset(to, value, bytes);
    return cudaSuccess;
}

/* --- streams, events, graphs: only who captures is known here; what is in order with what, work.py keeps ------------ */

typedef struct Stream {
    unsigned long long capture; /* 0: none */
    int priority, device;
} Stream;
typedef struct Event {
    unsigned long long capture;
    int device;
} Event;
static Stream first_streams[DEVICES], *capturing[MOST_STREAMS];
static int n_capturing;
static _Atomic unsigned long long n_captures;

static Stream *of(cudaStream_t stream) { return stream ? (Stream *)stream : &first_streams[current]; }
static void capture(Stream *stream, unsigned long long number) {
    if (n_capturing == MOST_STREAMS) abort();
    stream->capture = number;
    capturing[n_capturing++] = stream;
}
static cudaError_t waits(cudaStream_t stream) {
    return of(stream)->capture ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
unsigned long long pretended_capture(void *stream) { return of(stream)->capture; }

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *made, unsigned flags, int priority) {
    Stream *stream = calloc(1, sizeof *stream);
    stream->priority = priority;
    stream->device = current;
    *made = (cudaStream_t)stream;
    return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *found) { *found = of(stream)->priority; return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return waits(stream); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waits(stream); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = of(stream)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *number,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *n_nodes) {
    if (number) *number = of(stream)->capture;
    if (graph) *graph = (cudaGraph_t)of(stream)->capture;
    if (nodes) *nodes = 0;
    if (edges) *edges = 0;
    if (n_nodes) *n_nodes = 0;
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    static __thread enum cudaStreamCaptureMode of_thread = cudaStreamCaptureModeGlobal;
    enum cudaStreamCaptureMode before = of_thread;
    of_thread = *mode;
    *mode = before;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    n_capturing = 0;
    capture(of(stream), ++n_captures);
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    *graph = (cudaGraph_t)of(stream)->capture;
    while (n_capturing) capturing[--n_capturing]->capture = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    unsigned long long number = ((Event *)event)->capture;
    if (number && !of(stream)->capture) capture(of(stream), number);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *made, unsigned flags) {
    Event *event = calloc(1, sizeof *event);
    event->device = current;
    *made = (cudaEvent_t)event;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (((Event *)event)->device != (stream ? of(stream)->device : current)) return cudaErrorInvalidResourceHandle;
    ((Event *)event)->capture = of(stream)->capture;
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) { *ms = 1; return cudaSuccess; }

/* --- what is not pretended ------------------------------------------------------------------------------------------ */

static void refuse(const char *name) {
    fprintf(stderr, "pretended GPU: %s: torch launched what no Python kernel stands for\n", name);
    abort();
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
    refuse("cudaLaunchKernel");
    return cudaErrorNotSupported;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **args) {
    refuse("cudaLaunchKernelExC");
    return cudaErrorNotSupported;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *found = 0;
    if (result) *result = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

/* --- the driver, which torch opens by the name of this library ------------------------------------------------------ */

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return 0;
}
