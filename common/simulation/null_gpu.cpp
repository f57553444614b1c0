// A CUDA device that does nothing, for torch's own CUDA build: this library stands in front of libcudart, libcublas, libcublasLt
// and libnccl by LD_PRELOAD, and is libcuda.so.1 as well.
//
// Device memory is reserved address space, without pages until something is written. Kernels, matrix products and collectives
// are counted and skipped. Copies and fills of up to 1 MB are done, so that what the host has sent comes back. A collective is
// answered by this rank alone. What is real is all above: torch's caching allocator, its checks of devices, its choice of an
// attention kernel, autograd, streams, ProcessGroupNCCL.
//
// build.py compiles it without NVIDIA's headers and adds a stub that answers "success" for every other function that the
// installed torch imports. CUDA_VERSION, 1000 x major + 10 x minor, is that of torch; major 12 and 13 are known.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

// ---- the structs of driver_types.h, as far as they are read or written here -----------------------------------------------

enum { SUCCESS = 0, OUT_OF_MEMORY = 2 };
enum { NOT_KNOWN = 0, HOST = 1, DEVICE = 2, MANAGED = 3 };  // cudaMemoryType

struct dim3 { unsigned x, y, z; };

struct cudaDeviceProp {
  char name[256], uuid[16], luid[8];
  unsigned luidDeviceNodeMask;
  size_t totalGlobalMem, sharedMemPerBlock;
  int regsPerBlock, warpSize;
  size_t memPitch;
  int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
#if CUDA_VERSION < 13000
  int clockRate;
#endif
  size_t totalConstMem;
  int major, minor;
  size_t textureAlignment, texturePitchAlignment;
#if CUDA_VERSION < 13000
  int deviceOverlap;
#endif
  int multiProcessorCount;
#if CUDA_VERSION < 13000
  int kernelExecTimeoutEnabled;
#endif
  int integrated, canMapHostMemory;
#if CUDA_VERSION < 13000
  int computeMode;
#endif
  int maxTexture1D, maxTexture1DMipmap;
#if CUDA_VERSION < 13000
  int maxTexture1DLinear;
#endif
  int maxTexture2D[2], maxTexture2DMipmap[2], maxTexture2DLinear[3], maxTexture2DGather[2], maxTexture3D[3], maxTexture3DAlt[3];
  int maxTextureCubemap, maxTexture1DLayered[2], maxTexture2DLayered[3], maxTextureCubemapLayered[2];
  int maxSurface1D, maxSurface2D[2], maxSurface3D[3], maxSurface1DLayered[2], maxSurface2DLayered[3];
  int maxSurfaceCubemap, maxSurfaceCubemapLayered[2];
  size_t surfaceAlignment;
  int concurrentKernels, ECCEnabled, pciBusID, pciDeviceID, pciDomainID, tccDriver, asyncEngineCount, unifiedAddressing;
#if CUDA_VERSION < 13000
  int memoryClockRate;
#endif
  int memoryBusWidth, l2CacheSize, persistingL2CacheMaxSize, maxThreadsPerMultiProcessor;
  int streamPrioritiesSupported, globalL1CacheSupported, localL1CacheSupported;
  size_t sharedMemPerMultiprocessor;
  int regsPerMultiprocessor, managedMemory, isMultiGpuBoard, multiGpuBoardGroupID;
#if CUDA_VERSION < 13000
  int hostNativeAtomicSupported, singleToDoublePrecisionPerfRatio, pageableMemoryAccess, concurrentManagedAccess;
  int computePreemptionSupported, canUseHostPointerForRegisteredMem, cooperativeLaunch, cooperativeMultiDeviceLaunch;
#else
  int hostNativeAtomicSupported, pageableMemoryAccess, concurrentManagedAccess;
  int computePreemptionSupported, canUseHostPointerForRegisteredMem, cooperativeLaunch;
#endif
  size_t sharedMemPerBlockOptin;
  int pageableMemoryAccessUsesHostPageTables, directManagedMemAccessFromHost, maxBlocksPerMultiProcessor;
  int accessPolicyMaxWindowSize;
  size_t reservedSharedMemPerBlock;
  int rest[80];  // zero; more than the real struct has is not written
};

struct cudaPointerAttributes { int type, device; void *devicePointer, *hostPointer; long reserved[CUDA_VERSION < 13000 ? 0 : 8]; };

struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA, maxDynamicSharedSizeBytes, preferredShmemCarveout;
};

struct cudaLaunchConfig { dim3 grid, block; size_t shared; void* stream; };

// ---- what is counted ---------------------------------------------------------------------------------------------------

struct Count { long calls = 0; double amount = 0; };
static std::mutex counting;
static std::map<std::string, Count> counts;
static std::atomic<bool> recording{false};
static std::atomic<void (*)(const char*)> on_sync{nullptr};

static void count(const std::string& what, double amount, bool always = false) {
  if (!recording && !always) return;
  std::lock_guard<std::mutex> guard(counting);
  Count& c = counts[what];
  c.calls += 1, c.amount += amount;
}

static void sync(const char* what) {  // the host waits for the device
  count(std::string("sync\t") + what, 0);
  auto callback = on_sync.load();
  if (callback && recording) callback(what);
}

API void null_gpu_record(int on) { recording = on != 0; }
API void null_gpu_clear() { std::lock_guard<std::mutex> guard(counting); counts.clear(); }
API void null_gpu_on_sync(void (*callback)(const char*)) { on_sync = callback; }
API void null_gpu_count(const char* what, double amount) { count(what, amount); }

API int null_gpu_report(const char* path) {  // a line per kind: KIND TAB NAME... TAB calls TAB amount
  std::lock_guard<std::mutex> guard(counting);
  FILE* file = fopen(path, "w");
  if (!file) return 1;
  for (auto& [what, c] : counts) fprintf(file, "%s\t%ld\t%.0f\n", what.c_str(), c.calls, c.amount);
  return fclose(file);
}

// ---- memory ------------------------------------------------------------------------------------------------------------

static std::mutex regions_mutex;
static std::map<uintptr_t, std::pair<size_t, int>> regions;  // begin -> size, cudaMemoryType
static size_t used = 0;                                       // bytes of device memory
static thread_local int device = 0;

static size_t from_env(const char* name, size_t otherwise) {
  const char* value = getenv(name);
  return value ? strtoull(value, nullptr, 10) : otherwise;
}
static size_t capacity() { static size_t n = from_env("NULL_GPU_MEMORY", 85045608448ull); return n; }

static void* reserve(size_t size, int type, bool counts_now = true) {
  std::lock_guard<std::mutex> guard(regions_mutex);
  size = std::max<size_t>((size + 4095) / 4096 * 4096, 4096);
  if (type == DEVICE && counts_now && used + size > capacity()) return nullptr;
  void* begin = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin == MAP_FAILED) return nullptr;
  regions[(uintptr_t)begin] = {size, type};
  if (type == DEVICE && counts_now) used += size;
  return begin;
}

static void release(void* begin, bool counted = true) {
  std::lock_guard<std::mutex> guard(regions_mutex);
  auto found = regions.find((uintptr_t)begin);
  if (found == regions.end()) return;
  if (found->second.second == DEVICE && counted) used -= found->second.first;
  munmap(begin, found->second.first);
  regions.erase(found);
}

static int type_of(const void* p) {
  std::lock_guard<std::mutex> guard(regions_mutex);
  auto after = regions.upper_bound((uintptr_t)p);
  if (after == regions.begin()) return NOT_KNOWN;
  --after;
  return (uintptr_t)p < after->first + after->second.first ? after->second.second : NOT_KNOWN;
}

static const size_t SMALL = 1 << 20;
static void move(void* to, const void* from, size_t n) { if (to && from && n && n <= SMALL) memmove(to, from, n); }

static int allocate(void** p, size_t n, int type) { *p = reserve(n, type); return *p ? SUCCESS : OUT_OF_MEMORY; }
API int cudaMalloc(void** p, size_t n) { return allocate(p, n, DEVICE); }
API int cudaMallocAsync(void** p, size_t n, void*) { return allocate(p, n, DEVICE); }
API int cudaMallocManaged(void** p, size_t n, unsigned) { return allocate(p, n, MANAGED); }
API int cudaHostAlloc(void** p, size_t n, unsigned) { return allocate(p, n, HOST); }
API int cudaMallocHost(void** p, size_t n) { return allocate(p, n, HOST); }
API int cudaFree(void* p) { release(p); return SUCCESS; }
API int cudaFreeAsync(void* p, void*) { release(p); return SUCCESS; }
API int cudaFreeHost(void* p) { release(p); return SUCCESS; }
API int cudaMemGetInfo(size_t* free, size_t* total) { *total = capacity(), *free = capacity() - used; return SUCCESS; }
API int cudaGetSymbolAddress(void** p, const void*) { static char zeros[1 << 16]; *p = zeros; return SUCCESS; }
API int cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  a->type = type_of(p), a->device = device;
  if (a->type) a->devicePointer = (void*)p;
  if (a->type == HOST || a->type == MANAGED) a->hostPointer = (void*)p;
  return SUCCESS;
}

static std::string side(const void* p) { int type = type_of(p); return type == DEVICE ? "device" : type == HOST ? "pinned" : "pageable"; }
static void copied(const void* to, const void* from, double n) { count("copy\t" + side(from) + " to " + side(to), n); }
API int cudaMemcpyAsync(void* to, const void* from, size_t n, int, void*) { copied(to, from, n); move(to, from, n); return SUCCESS; }
API int cudaMemcpy(void* to, const void* from, size_t n, int) { copied(to, from, n); sync("cudaMemcpy"); move(to, from, n); return SUCCESS; }
API int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, void*) { copied(to, from, n); move(to, from, n); return SUCCESS; }
API int cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, int, void*) {
  copied(to, from, (double)width * height);
  for (size_t row = 0; width * height <= SMALL && row < height; row++)
    memmove((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
  return SUCCESS;
}
API int cudaMemsetAsync(void* p, int value, size_t n, void*) { count("fill\t", n); if (n <= SMALL) memset(p, value, n); return SUCCESS; }
API int cudaMemset(void* p, int value, size_t n) { return cudaMemsetAsync(p, value, n, nullptr); }

// Virtual memory of the driver, which torch's allocator uses with expandable_segments
API int cuMemGetAllocationGranularity(size_t* n, const void*, int) { *n = 2 << 20; return SUCCESS; }
API int cuMemAddressReserve(void** p, size_t n, size_t, void*, unsigned long long) { *p = reserve(n, DEVICE, false); return *p ? SUCCESS : OUT_OF_MEMORY; }
API int cuMemAddressFree(void* p, size_t) { release(p, false); return SUCCESS; }
API int cuMemCreate(unsigned long long* handle, size_t n, const void*, unsigned long long) {
  std::lock_guard<std::mutex> guard(regions_mutex);
  if (used + n > capacity()) return OUT_OF_MEMORY;
  used += n, *handle = n;
  return SUCCESS;
}
API int cuMemRelease(unsigned long long handle) { std::lock_guard<std::mutex> guard(regions_mutex); used -= handle; return SUCCESS; }

// ---- device ------------------------------------------------------------------------------------------------------------

API int cudaGetDeviceCount(int* n) { *n = 1; return SUCCESS; }
API int cudaGetDevice(int* d) { *d = device; return SUCCESS; }
API int cudaSetDevice(int d) { device = d; return SUCCESS; }
API int cudaRuntimeGetVersion(int* v) { *v = CUDA_VERSION; return SUCCESS; }
API int cudaDriverGetVersion(int* v) { *v = CUDA_VERSION; return SUCCESS; }
API int cuDriverGetVersion(int* v) { *v = CUDA_VERSION; return SUCCESS; }
API int cudaDeviceSynchronize() { sync("cudaDeviceSynchronize"); return SUCCESS; }
API int cudaDeviceCanAccessPeer(int* can, int, int) { *can = 1; return SUCCESS; }
API int cudaDeviceGetPCIBusId(char* id, int n, int) { snprintf(id, n, "0000:00:00.0"); return SUCCESS; }
API int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { if (least) *least = 0; if (greatest) *greatest = -5; return SUCCESS; }
API const char* cudaGetErrorString(int e) { return e == OUT_OF_MEMORY ? "out of memory" : e ? "error of the null GPU" : "no error"; }
API const char* cudaGetErrorName(int e) { return e == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaSuccess"; }

// An H100 SXM (H100 white paper, table 3; CUDA C++ programming guide, "Technical Specifications per Compute Capability")
static const size_t PROP_BYTES = CUDA_VERSION < 13000 ? 1032 : 1008;  // sizeof(cudaDeviceProp) of NVIDIA's headers
static int properties(cudaDeviceProp* out) {
  cudaDeviceProp p;
  memset(&p, 0, sizeof p);
  strcpy(p.name, "NVIDIA H100 80GB HBM3");
  p.totalGlobalMem = capacity(), p.major = 9, p.minor = 0, p.multiProcessorCount = 132, p.warpSize = 32;
  p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiProcessor = 2048, p.maxBlocksPerMultiProcessor = 32;
  p.sharedMemPerBlock = 49152, p.sharedMemPerBlockOptin = 232448, p.sharedMemPerMultiprocessor = 233472;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.l2CacheSize = 52428800, p.memoryBusWidth = 5120;
  p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024, p.maxThreadsDim[2] = 64;
  p.maxGridSize[0] = 2147483647, p.maxGridSize[1] = p.maxGridSize[2] = 65535;
  p.concurrentKernels = p.unifiedAddressing = p.cooperativeLaunch = 1, p.textureAlignment = 512;
  memcpy(out, &p, PROP_BYTES);
  return SUCCESS;
}
API int cudaGetDeviceProperties(cudaDeviceProp* p, int) { return properties(p); }
API int cudaGetDeviceProperties_v2(cudaDeviceProp* p, int) { return properties(p); }  // the symbol of CUDA 12
API int cudaDeviceGetAttribute(int* value, int attribute, int) {
  static const std::map<int, int> known = {  // cudaDeviceAttr
    {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {10, 32}, {12, 65536},
    {16, 132}, {38, 52428800}, {39, 2048}, {75, 9}, {76, 0}, {81, 233472}, {82, 65536}, {97, 232448}, {106, 32}};
  auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return SUCCESS;
}
API int cuDeviceGetAttribute(int* value, int attribute, int d) { return cudaDeviceGetAttribute(value, attribute, d); }
API int cuDeviceGet(int* d, int ordinal) { *d = ordinal; return SUCCESS; }
API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { if (flags) *flags = 0; if (active) *active = 1; return SUCCESS; }
API int cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)16; return SUCCESS; }
API int cuCtxGetCurrent(void** context) { *context = (void*)16; return SUCCESS; }
API int cuGetErrorString(int, const char** text) { *text = "error of the null GPU"; return SUCCESS; }

static int success() { return SUCCESS; }
static int entry_point(const char* name, void** p, int* found) {
  void* own = dlsym(RTLD_DEFAULT, name);
  *p = own ? own : (void*)success;
  if (found) *found = 0;  // cudaDriverEntryPointSuccess
  return SUCCESS;
}
API int cudaGetDriverEntryPointByVersion(const char* name, void** p, unsigned, unsigned long long, int* found) { return entry_point(name, p, found); }
API int cudaGetDriverEntryPoint(const char* name, void** p, unsigned long long, int* found) { return entry_point(name, p, found); }
API int cuGetProcAddress_v2(const char* name, void** p, int, uint64_t, int* found) { return entry_point(name, p, found); }

// ---- streams and events ------------------------------------------------------------------------------------------------

static int make(void** handle) { static std::atomic<uintptr_t> next{4096}; *handle = (void*)(next += 16); return SUCCESS; }
API int cudaStreamCreate(void** s) { return make(s); }
API int cudaStreamCreateWithFlags(void** s, unsigned) { return make(s); }
API int cudaStreamCreateWithPriority(void** s, unsigned, int) { return make(s); }
API int cudaStreamSynchronize(void*) { sync("cudaStreamSynchronize"); return SUCCESS; }
API int cudaStreamGetPriority(void*, int* priority) { *priority = 0; return SUCCESS; }
API int cudaStreamIsCapturing(void*, int* status) { *status = 0; return SUCCESS; }
static int not_capturing(int* status, unsigned long long* id) { if (status) *status = 0; if (id) *id = 0; return SUCCESS; }
API int cudaStreamGetCaptureInfo(void*, int* status, unsigned long long* id) { return not_capturing(status, id); }
API int cudaStreamGetCaptureInfo_v2(void*, int* status, unsigned long long* id) { return not_capturing(status, id); }
API int cudaStreamGetCaptureInfo_v3(void*, int* status, unsigned long long* id) { return not_capturing(status, id); }
API int cudaEventCreate(void** e) { return make(e); }
API int cudaEventCreateWithFlags(void** e, unsigned) { return make(e); }
API int cudaEventSynchronize(void*) { sync("cudaEventSynchronize"); return SUCCESS; }
API int cudaEventElapsedTime(float* ms, void*, void*) { *ms = 1; return SUCCESS; }
API int cudaEventElapsedTime_v2(float* ms, void*, void*) { *ms = 1; return SUCCESS; }

// ---- kernels -----------------------------------------------------------------------------------------------------------

static std::unordered_map<const void*, const char*> names;  // filled while libraries load, before any launch
static int launched(const void* kernel) {
  auto found = names.find(kernel);
  count(std::string("kernel\t") + (found == names.end() ? "unknown" : found->second), 0);
  return SUCCESS;
}

API void** __cudaRegisterFatBinary(void*) { static void* handle[4]; return handle; }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) { names[host] = name; }

struct Configuration { dim3 grid, block; size_t shared; void* stream; };
static thread_local std::vector<Configuration> configurations;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
API int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *(void**)stream = c.stream;
  return SUCCESS;
}
API int __cudaGetKernel(const void** kernel, const void* function) { *kernel = function; return SUCCESS; }
API int __cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, void*) { return launched(kernel); }
API int cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, void*) { return launched(kernel); }
API int cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t, void*) { return launched(kernel); }
API int cudaLaunchKernelExC(const cudaLaunchConfig*, const void* kernel, void**) { return launched(kernel); }
API int cuLaunchKernel(const void* kernel, ...) { return launched(kernel); }  // compiled while the program runs
API int cuModuleGetFunction(void** function, void*, const char*) { return make(function); }
API int cuModuleLoadData(void** module, const void*) { return make(module); }
API int cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->binaryVersion = a->ptxVersion = 90, a->numRegs = 32, a->maxDynamicSharedSizeBytes = 49152;
  return SUCCESS;
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) { *n = 2; return SUCCESS; }
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 2; return SUCCESS; }
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) { *n = 2; return SUCCESS; }

// ---- matrix products ---------------------------------------------------------------------------------------------------

static const char* dtype(int t) {  // cudaDataType
  switch (t) {
    case 0: return "fp32"; case 1: return "fp64"; case 2: return "fp16"; case 14: return "bf16";
    case 28: return "fp8_e4m3"; case 29: return "fp8_e5m2"; default: return "other";
  }
}
static int product(double m, double n, double k, double batch, int type) {
  count(std::string("gemm\t") + dtype(type), 2 * m * n * k * batch);
  return 0;
}
typedef const void* In;
API int cublasCreate_v2(void** handle) { *handle = malloc(64); return 0; }
API int cublasDestroy_v2(void* handle) { free(handle); return 0; }
API int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
API int cublasGemmEx(void*, int, int, int m, int n, int k, In, In, int type, ...) { return product(m, n, k, 1, type); }
API int cublasGemmStridedBatchedEx(
    void*, int, int, int m, int n, int k, In, In, int type, int, long long, In, int, int, long long, In, void*, int, int,
    long long, int batch, int, int) { return product(m, n, k, batch, type); }
API int cublasSgemmEx(void*, int, int, int m, int n, int k, In, In, int type, ...) { return product(m, n, k, 1, type); }
API int cublasSgemm_v2(void*, int, int, int m, int n, int k, ...) { return product(m, n, k, 1, 0); }
API int cublasDgemm_v2(void*, int, int, int m, int n, int k, ...) { return product(m, n, k, 1, 1); }
API int cublasSgemmStridedBatched(
    void*, int, int, int m, int n, int k, In, In, int, long long, In, int, long long, In, void*, int, long long, int batch) {
  return product(m, n, k, batch, 0);
}
API int cublasDgemmStridedBatched(
    void*, int, int, int m, int n, int k, In, In, int, long long, In, int, long long, In, void*, int, long long, int batch) {
  return product(m, n, k, batch, 1);
}
API int cublasSgemv_v2(void*, int, int m, int n, ...) { return product(m, 1, n, 1, 0); }

struct Layout { int type; double rows, columns; int batch; };
API int cublasLtMatrixLayoutCreate(Layout** l, int type, uint64_t rows, uint64_t columns, int64_t) { *l = new Layout{type, (double)rows, (double)columns, 1}; return 0; }
API int cublasLtMatrixLayoutDestroy(Layout* l) { delete l; return 0; }
API int cublasLtMatrixLayoutSetAttribute(Layout* l, int attribute, const int* value, size_t) { if (attribute == 5) l->batch = *value; return 0; }  // CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT
struct Description { int transposed; };
API int cublasLtMatmulDescCreate(Description** d, int, int) { *d = new Description{0}; return 0; }
API int cublasLtMatmulDescDestroy(Description* d) { delete d; return 0; }
API int cublasLtMatmulDescSetAttribute(Description* d, int attribute, const int* value, size_t) { if (attribute == 3) d->transposed = *value; return 0; }  // CUBLASLT_MATMUL_DESC_TRANSA
API int cublasLtMatmulPreferenceCreate(void** p) { *p = malloc(16); return 0; }
API int cublasLtMatmulPreferenceDestroy(void* p) { free(p); return 0; }
struct Heuristic { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; };
API int cublasLtMatmulAlgoGetHeuristic(In, In, In, In, In, In, In, int, Heuristic* h, int* found) { memset(h, 0, sizeof *h); *found = 1; return 0; }
API int cublasLtMatmul(In, Description* d, In, In, Layout* a, In, In, In, In, Layout* c, ...) {
  return product(c->rows, c->columns, d->transposed ? a->rows : a->columns, c->batch, a->type);
}
API size_t cublasLtGetVersion() { return 130000; }

// ---- collectives -------------------------------------------------------------------------------------------------------

struct Communicator { int size, rank; };
struct UniqueId { char bytes[128]; };
static std::atomic<int> next_size{1}, next_rank{0};
static int communicator(Communicator** c, int size, int rank) {
  *c = new Communicator{size, rank};
  count("communicator\t" + std::to_string(size), 0, true);
  return 0;
}
// The group that the next ncclCommSplit makes: the other ranks' colours would say. size 0: this rank is not in it
API void null_gpu_next_group(int size, int rank) { next_size = size, next_rank = rank; }
API int ncclGetVersion(int* v) { *v = 22907; return 0; }
API int ncclGetUniqueId(UniqueId* id) { memset(id, 7, sizeof *id); return 0; }
API int ncclCommInitRank(Communicator** c, int size, UniqueId, int rank) { return communicator(c, size, rank); }
API int ncclCommInitRankConfig(Communicator** c, int size, UniqueId, int rank, void*) { return communicator(c, size, rank); }
API int ncclCommInitRankScalable(Communicator** c, int size, int rank, int, UniqueId*, void*) { return communicator(c, size, rank); }
API int ncclCommSplit(Communicator*, int colour, int, Communicator** c, void*) {
  if (colour < 0 || !next_size) { *c = nullptr; return 0; }
  return communicator(c, next_size, next_rank);
}
API int ncclCommGetAsyncError(Communicator*, int* e) { *e = 0; return 0; }
API int ncclCommCount(Communicator* c, int* n) { *n = c->size; return 0; }
API int ncclCommUserRank(Communicator* c, int* n) { *n = c->rank; return 0; }
API const char* ncclGetErrorString(int) { return "error of the null GPU"; }
API const char* ncclGetLastError(Communicator*) { return ""; }
API int ncclMemAlloc(void** p, size_t n) { return cudaMalloc(p, n); }
API int ncclMemFree(void* p) { return cudaFree(p); }
API int ncclRedOpCreatePreMulSum(int* op, void*, int, int, Communicator*) { *op = 5; return 0; }

static const size_t WIDTHS[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // ncclDataType_t
static const char* TYPES[] = {"int8", "uint8", "int32", "uint32", "int64", "uint64", "fp16", "fp32", "fp64", "bf16", "fp8_e4m3", "fp8_e5m2"};
// bytes: of the whole tensor that the collective is about, as in NCCL's own tests (the larger of input and output)
static size_t collective(const char* op, const Communicator* c, size_t elements, int type, const void* buffer) {
  count(std::string("collective\t") + op + "\t" + TYPES[type] + "\t" + std::to_string(c->size), (double)elements * WIDTHS[type]);
  if (buffer && type_of(buffer) != DEVICE) count(std::string("fault\tnccl ") + op + " of memory that is not the device's", 0, true);
  return WIDTHS[type];
}
API int ncclAllReduce(const void* from, void* to, size_t n, int type, int, Communicator* c, void*) {
  size_t width = collective("all_reduce", c, n, type, from);
  move(to, from, n * width);
  return 0;
}
API int ncclBroadcast(const void* from, void* to, size_t n, int type, int root, Communicator* c, void*) {
  size_t width = collective("broadcast", c, n, type, to);
  if (root == c->rank) move(to, from, n * width);
  return 0;
}
API int ncclBcast(void* buffer, size_t n, int type, int, Communicator* c, void*) { collective("broadcast", c, n, type, buffer); return 0; }
API int ncclReduce(const void* from, void* to, size_t n, int type, int, int, Communicator* c, void*) {
  size_t width = collective("reduce", c, n, type, from);
  move(to, from, n * width);
  return 0;
}
API int ncclAllGather(const void* from, void* to, size_t n, int type, Communicator* c, void*) {
  size_t width = collective("all_gather", c, n * c->size, type, from);
  for (int rank = 0; rank < c->size; rank++) move((char*)to + rank * n * width, from, n * width);
  return 0;
}
API int ncclReduceScatter(const void* from, void* to, size_t n, int type, int, Communicator* c, void*) {
  size_t width = collective("reduce_scatter", c, n * c->size, type, from);
  move(to, (const char*)from + c->rank * n * width, n * width);
  return 0;
}
API int ncclAlltoAll(const void* from, void* to, size_t n, int type, Communicator* c, void*) {
  size_t width = collective("all_to_all", c, n * c->size, type, from);
  move(to, from, n * c->size * width);
  return 0;
}
API int ncclSend(const void* from, size_t n, int type, int, Communicator* c, void*) { collective("send", c, n, type, from); return 0; }
API int ncclRecv(void* to, size_t n, int type, int, Communicator* c, void*) { collective("recv", c, n, type, to); return 0; }
