// CUDA's execution model on a CPU: enough of it to run these kernels, unchanged, without a GPU.
//
// Blocks run one after another. The threads of a block are fibers that hand over to each other at
// __syncthreads(), which is fast and shows a barrier that not all threads reach; with
// CPU_EXECUTION_THREADS they are operating-system threads and the barrier is a real one, which lets
// ThreadSanitizer see races. Not here: warps, several streams, clocks.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#if defined(CPU_EXECUTION_THREADS)
#include <pthread.h>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
// One block runs at a time, so what its threads share may be static.
#define __shared__ static
#define __launch_bounds__(...)

namespace cpu_execution {

struct Dim3 {
    unsigned int x = 1, y = 1, z = 1;
};

struct Geometry {
    unsigned int grid_x, grid_y, block_x;
    std::size_t shared_bytes;
};

inline thread_local Dim3 thread_index, block_index, block_size, grid_size;
// A fresh allocation of exactly the requested size: AddressSanitizer sees any access beyond it.
inline std::unique_ptr<unsigned long long[]> shared_memory;

inline unsigned long long* dynamic_shared() { return shared_memory.get(); }

inline void set_block(const Geometry& geometry, unsigned int x, unsigned int y) {
    grid_size = {geometry.grid_x, geometry.grid_y, 1};
    block_size = {geometry.block_x, 1, 1};
    block_index = {x, y, 0};
}

#if defined(CPU_EXECUTION_THREADS)

// Two barriers take turns. Of a single one, a thread that wakes up late would also see what faster
// threads did before they came to it again, and ThreadSanitizer would take that for an order.
inline pthread_barrier_t barriers[2];
inline thread_local unsigned int num_waits = 0;

inline void synchronize_block() { pthread_barrier_wait(&barriers[num_waits++ % 2]); }

template <class Body>
void run_block(const Geometry& geometry, unsigned int x, unsigned int y, Body& body) {
    for (pthread_barrier_t& barrier : barriers)
        pthread_barrier_init(&barrier, nullptr, geometry.block_x);
    std::vector<std::thread> threads;
    for (unsigned int i = 0; i < geometry.block_x; ++i)
        threads.emplace_back([&, i] {
            set_block(geometry, x, y);
            thread_index = {i, 0, 0};
            body();
        });
    for (std::thread& thread : threads) thread.join();
    for (pthread_barrier_t& barrier : barriers) pthread_barrier_destroy(&barrier);
}

#else

constexpr std::size_t stack_bytes = 128 * 1024;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool is_done = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::size_t running;
inline void (*run_body)(void*);
inline void* body_of_block;

inline void synchronize_block() { swapcontext(&fibers[running].context, &scheduler); }

inline void fiber_main() {
    run_body(body_of_block);
    fibers[running].is_done = true;
    // uc_link leads back to the scheduler.
}

inline void start_fiber(Fiber& fiber) {
    getcontext(&fiber.context);
    if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = &scheduler;
    fiber.is_done = false;
    makecontext(&fiber.context, fiber_main, 0);
}

// Each round runs every thread to its next barrier or its end; all must come to the same.
inline void run_rounds(unsigned int num_threads) {
    for (unsigned int round = 0, num_done = 0; num_done < num_threads; ++round) {
        for (unsigned int i = 0; i < num_threads; ++i) {
            // The order changes from round to round: a result must not depend on it.
            running = round % 2 == 0 ? i : num_threads - 1 - i;
            thread_index = {static_cast<unsigned int>(running), 0, 0};
            swapcontext(&scheduler, &fibers[running].context);
            num_done += fibers[running].is_done;
        }
        if (num_done != 0 && num_done != num_threads) {
            std::fprintf(stderr, "%u of %u threads ended before a barrier of their block\n",
                         num_done, num_threads);
            std::abort();
        }
    }
}

template <class Body>
void run_block(const Geometry& geometry, unsigned int x, unsigned int y, Body& body) {
    set_block(geometry, x, y);
    if (fibers.size() < geometry.block_x) fibers.resize(geometry.block_x);
    run_body = [](void* argument) { (*static_cast<Body*>(argument))(); };
    body_of_block = &body;
    for (unsigned int i = 0; i < geometry.block_x; ++i) start_fiber(fibers[i]);
    run_rounds(geometry.block_x);
}

#endif

template <class Body>
void run_grid(const Geometry& geometry, Body body) {
    for (unsigned int y = 0; y < geometry.grid_y; ++y)
        for (unsigned int x = 0; x < geometry.grid_x; ++x) {
            const std::size_t words = (geometry.shared_bytes + 7) / 8;
            shared_memory.reset(new unsigned long long[words]);
            // Shared memory starts undefined on a GPU; a pattern makes reading it show.
            std::memset(shared_memory.get(), 0xa5, words * 8);
            run_block(geometry, x, y, body);
        }
}

template <class... Args, std::size_t... I>
void launch_unpacked(void (*kernel)(Args...), const Geometry& geometry, void** arguments,
                     std::index_sequence<I...>) {
    run_grid(geometry, [=] { kernel(*static_cast<Args*>(arguments[I])...); });
}

// ``arguments`` as for cuLaunchKernel: one pointer to each argument.
template <class... Args>
void launch(void (*kernel)(Args...), const Geometry& geometry, void** arguments) {
    launch_unpacked(kernel, geometry, arguments, std::index_sequence_for<Args...>{});
}

template <class To, class From>
To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

// The old value, as CUDA's atomics return it.
template <class T, class Choose>
T atomic_update(T* address, T operand, Choose choose) {
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(address, &old, choose(old, operand), false,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

}  // namespace cpu_execution

#define threadIdx cpu_execution::thread_index
#define blockIdx cpu_execution::block_index
#define blockDim cpu_execution::block_size
#define gridDim cpu_execution::grid_size

inline void __syncthreads() { cpu_execution::synchronize_block(); }

template <class T>
T atomicAdd(T* address, T value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <class T>
T atomicOr(T* address, T value) {
    return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

template <class T>
T atomicMax(T* address, T value) {
    return cpu_execution::atomic_update(address, value, [](T a, T b) { return a < b ? b : a; });
}

template <class T>
T atomicMin(T* address, T value) {
    return cpu_execution::atomic_update(address, value, [](T a, T b) { return b < a ? b : a; });
}

inline int __popc(unsigned int bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }

inline unsigned int __float_as_uint(float value) {
    return cpu_execution::bits_as<unsigned int>(value);
}
inline float __uint_as_float(unsigned int bits) { return cpu_execution::bits_as<float>(bits); }
inline long long __double_as_longlong(double value) {
    return cpu_execution::bits_as<long long>(value);
}

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
