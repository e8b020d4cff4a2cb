// An allocator of large arrays, preloaded into a run (LD_PRELOAD): memory that is freed is kept for the next request.
//
// XLA allocates its scratch memory anew in every step. The system takes freed memory of that size back, and each page of
// the next step's costs a fault; memory that glibc keeps is split by small arrays, and then the next step's is taken anew
// beside it. Here a block is given whole, and all that is kept goes back before another is taken. A step is ready a little
// before its scratch memory is freed, so that the next one's is waited for: else there would be two of it from then on.

#include <features.h>

#if defined(__GLIBC__)
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <cstddef>
#include <cstdint>

extern "C" {
void* __libc_memalign(size_t alignment, size_t size);
void* __libc_malloc(size_t size);
void* __libc_realloc(void* memory, size_t size);
void __libc_free(void* memory);
}

namespace {

constexpr size_t kLeast = size_t{16} << 20, kPage = 4096, kHugePage = size_t{2} << 20;
constexpr size_t kWorthWaiting = size_t{64} << 20;
constexpr long kWaitNanoseconds = 50'000'000;
constexpr int kBlocks = 512;

struct Block {
  char* data;  // null: none
  size_t size;
  bool is_used;
};

Block blocks[kBlocks];
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t freed = PTHREAD_COND_INITIALIZER;

struct Lock {
  Lock() { pthread_mutex_lock(&mutex); }
  ~Lock() { pthread_mutex_unlock(&mutex); }
};

__attribute__((constructor)) void keep_through_fork() {
  const auto unlock = [] { pthread_mutex_unlock(&mutex); };
  pthread_atfork([] { pthread_mutex_lock(&mutex); }, unlock, unlock);
}

// The smallest block, in use or not, that is large enough and at most an eighth larger: what is not used stays resident.
Block* fitting(size_t size, bool is_used) {
  Block* best = nullptr;
  for (Block& block : blocks)
    if (block.data && block.is_used == is_used && block.size >= size && block.size <= size + size / 8)
      if (!best || block.size < best->size) best = &block;
  return best;
}

void return_free() {
  for (Block& block : blocks)
    if (block.data && !block.is_used) {
      munmap(block.data, block.size);
      block.data = nullptr;
    }
}

// Pages of 2 MiB where the system grants them.
char* map(size_t size) {
  const size_t wide = size + kHugePage;
  char* start = (char*)mmap(nullptr, wide, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  char* data = (char*)(((uintptr_t)start + kHugePage - 1) / kHugePage * kHugePage);
  if (data > start) munmap(start, data - start);
  if (start + wide > data + size) munmap(data + size, start + wide - data - size);
  madvise(data, size, MADV_HUGEPAGE);
  return data;
}

void* take(size_t size) {
  const Lock lock;
  timespec end;
  clock_gettime(CLOCK_REALTIME, &end);
  end.tv_nsec += kWaitNanoseconds;
  if (end.tv_nsec >= 1'000'000'000) end.tv_sec++, end.tv_nsec -= 1'000'000'000;
  bool waits = size >= kWorthWaiting;
  Block* block;
  while (!(block = fitting(size, false)) && waits && fitting(size, true))
    waits = pthread_cond_timedwait(&freed, &mutex, &end) == 0;
  if (block) {
    block->is_used = true;
    return block->data;
  }
  return_free();
  for (Block& block : blocks)
    if (!block.data) {
      const size_t whole = (size + kPage - 1) / kPage * kPage;
      char* data = map(whole);
      if (data) block = {data, whole, true};
      return data;
    }
  return nullptr;
}

// The block at `memory`, which is another allocator's unless it begins a page.
Block* block_at(const void* memory) {
  if ((uintptr_t)memory % kPage) return nullptr;
  for (Block& block : blocks)
    if (block.data == memory && block.is_used) return &block;
  return nullptr;
}

size_t size_at(const void* memory) {
  if (!memory || (uintptr_t)memory % kPage) return 0;
  const Lock lock;
  const Block* block = block_at(memory);
  return block ? block->size : 0;
}

}  // namespace

extern "C" {

void* memalign(size_t alignment, size_t size) {
  void* memory = size >= kLeast && alignment <= kPage ? take(size) : nullptr;
  return memory ? memory : __libc_memalign(alignment, size);
}

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** memory, size_t alignment, size_t size) {
  if (alignment % sizeof(void*) || alignment & (alignment - 1) || !alignment) return EINVAL;
  const int before = errno;
  void* taken = memalign(alignment, size);
  errno = before;
  if (!taken) return ENOMEM;
  *memory = taken;
  return 0;
}

void free(void* memory) {
  if (memory && (uintptr_t)memory % kPage == 0) {
    const Lock lock;
    if (Block* block = block_at(memory)) {
      block->is_used = false;
      pthread_cond_broadcast(&freed);
      return;
    }
  }
  __libc_free(memory);
}

void* realloc(void* memory, size_t size) {
  const size_t before = size_at(memory);
  if (!before) return __libc_realloc(memory, size);
  void* taken = __libc_malloc(size);
  if (taken) {
    memcpy(taken, memory, size < before ? size : before);
    free(memory);
  }
  return taken;
}

size_t malloc_usable_size(void* memory) {
  if (const size_t size = size_at(memory)) return size;
  static const auto of_next = (size_t(*)(void*))dlsym(RTLD_NEXT, "malloc_usable_size");
  return of_next(memory);
}

// Returns what is kept to the system; the bytes.
size_t efficientllm_return_kept_memory() {
  const Lock lock;
  size_t bytes = 0;
  for (const Block& block : blocks)
    if (block.data && !block.is_used) bytes += block.size;
  return_free();
  return bytes;
}
}
#endif
