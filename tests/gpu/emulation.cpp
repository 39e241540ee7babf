// CUDA on one CPU thread: every CUDA thread is a coroutine that runs until it meets a barrier, a shuffle or
// an mma, and goes on when the others have met it too. It replaces gpu/kernels/instructions.cuh.
//
// Hostile where the hardware may be: blocks and threads run in one order, each warp as far as it gets, or in
// the reverse, warps in turn, so that what a barrier should have ordered is not in order; shared memory starts
// out as NaN; arrays end at a page that may not be touched. Copies and products of warpgroups are done as late
// as they may be. mma rounds its sum towards zero, as tensor cores are known to do.
#include "emulation.hpp"
#include "emulation_numbers.hpp"

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

Index threadIdx, blockIdx, gridDim;

// ---- coroutines
struct Copy {
    uint4 *to;
    const uint4 *from;
};
enum Waits { FOR_NOTHING, FOR_BLOCK, FOR_WARP, DONE };
struct Thread {
    ucontext_t context;  // where it begins
    bool begun;
    jmp_buf place;  // where it goes on
    Waits waits;
    std::string meets;  // which of the operations of a warp
    unsigned a[4], b[2];
    float d[4];
    float value;
    int lane_mask;
    std::deque<std::vector<Copy>> groups;  // copies in flight; the last group is open
    std::vector<const uint4 *> hidden;     // what this thread has copied, from tensor cores
    float *sums;                           // of a product of a warpgroup
    const uint4 *columns;
    size_t left;  // groups of products that need not be done
};
static std::vector<Thread> threads;
static std::unique_ptr<char[]> stacks;  // for a launch, and no zeros: every kernel has a device of its own
static jmp_buf scheduler;
static int current;
constexpr size_t STACK = 64 * 1024;

// Jumps rather than swapcontext, which asks the kernel for the signal mask each time.
static void wait(Waits what) {
    threads[current].waits = what;
    if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}
static void go_on() {
    Thread &own = threads[current];
    if (_setjmp(scheduler)) return;
    if (own.begun) _longjmp(own.place, 1);
    own.begun = true;
    setcontext(&own.context);
}
void __syncthreads() { wait(FOR_BLOCK); }

float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
    Thread &own = threads[current];
    own.meets = mask == 0xffffffffu ? "shuffle" : "shuffle of some lanes";
    own.value = value, own.lane_mask = lane_mask;
    wait(FOR_WARP);
    return own.value;
}

// Of a warp, so that what other lanes have copied is there; they may not be far ahead, either.
void __syncwarp() {
    threads[current].meets = "syncwarp";
    wait(FOR_WARP);
}

// Copies are made when they must have come, and not before: until then there is NaN where they go.
void copy_async(uint4 *to, const uint4 *from) {
    std::memset(to, 0xff, sizeof *to);
    threads[current].groups.back().push_back({to, from});
}
void close_group() { threads[current].groups.emplace_back(); }
void make_copies(size_t left) {
    auto &groups = threads[current].groups;
    for (; groups.size() > left; groups.pop_front())
        for (const Copy &copy : groups.front()) {
            *copy.to = *copy.from;
            threads[current].hidden.push_back(copy.to);
        }
}
void show_to_tensor_cores() { threads[current].hidden.clear(); }

// ---- tensor cores
template <class T>
void mma(T, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    Thread &own = threads[current];
    own.meets = T::MANTISSA == 10 ? "mma f16" : "mma bf16";
    std::copy(a, a + 4, own.a);
    std::copy(d, d + 4, own.d);
    own.b[0] = b0, own.b[1] = b1;
    wait(FOR_WARP);
    std::copy(own.d, own.d + 4, d);
}
template void mma(Float16, float (&)[4], const unsigned (&)[4], unsigned, unsigned);
template void mma(BFloat16, float (&)[4], const unsigned (&)[4], unsigned, unsigned);

static float towards_zero(double value) {
    float result = float(value);
    if (std::isfinite(value) && (std::isinf(result) || std::fabs(result) > std::fabs(value)))
        result = std::nextafter(result, 0.0f);
    return std::fabs(value) < 0x1p128 ? result : float(value);
}
template <class T>
static void multiply_fragments(int first) {
    // "Matrix fragments for mma.m16n8k16 with floating point type" in the PTX manual.
    double A[16][16], B[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Thread &from = threads[first + lane];
        const int group = lane >> 2, in_group = lane & 3;
        for (int i = 0; i < 8; i++) {
            const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
            const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
            A[row][column] = widen(T{}, from.a[i / 2] >> 16 * (i % 2));
        }
        for (int i = 0; i < 4; i++)
            B[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = widen(T{}, from.b[i / 2] >> 16 * (i % 2));
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = (lane & 3) * 2 + (i & 1);
            double sum = threads[first + lane].d[i];
            for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
            threads[first + lane].d[i] = towards_zero(sum);
        }
}

// ---- products of a warpgroup, here of each of its warps: done when they are awaited
struct Product {
    double A[16][16];
    const uint4 *b;
    float *sums[32];
    void (*multiply)(const Product &);
};
struct Products {
    std::deque<std::vector<Product>> groups;  // the last is open
    bool begun;                               // since the last group was closed
};
static std::vector<Products> products;  // of every warp

template <class T>
void multiply_async(T, float (&d)[64], const unsigned (&a)[4], const uint4 *b) {
    Thread &own = threads[current];
    own.meets = T::MANTISSA == 10 ? "product f16" : "product bf16";
    std::copy(a, a + 4, own.a);
    own.sums = d, own.columns = b;
    wait(FOR_WARP);
}
template void multiply_async(Float16, float (&)[64], const unsigned (&)[4], const uint4 *);
template void multiply_async(BFloat16, float (&)[64], const unsigned (&)[4], const uint4 *);
static void meet_as(const char *what) {
    threads[current].meets = what;
    wait(FOR_WARP);
}
void begin_products(unsigned (&)[4][4]) { meet_as("begin products"); }
void close_products() { meet_as("close products"); }
void finish_products(size_t left) {
    threads[current].left = left;
    meet_as("await products");
}

template <class T>
static void multiply_columns(const Product &product) {
    constexpr int COLUMNS = WARPGROUP_COLUMNS;
    const auto *b = reinterpret_cast<const unsigned short *>(product.b);
    for (int column = 0; column < COLUMNS; column++) {
        double B[16];
        for (int k = 0; k < 16; k++) B[k] = widen(T{}, b[(k / 8 * COLUMNS + column) * 8 + k % 8]);
        for (int row = 0; row < 16; row++) {
            // "Register fragments" of wgmma.m64nNk16 in the PTX manual.
            const int lane = row % 8 * 4 + column % 8 / 2;
            float &d = product.sums[lane][column / 8 * 4 + row / 8 * 2 + column % 2];
            double sum = d;
            for (int k = 0; k < 16; k++) sum += product.A[row][k] * B[k];
            d = towards_zero(sum);
        }
    }
}
template <class T>
static Product begin_product(int first) {
    Product product;
    product.b = threads[first].columns;
    product.multiply = multiply_columns<T>;
    for (int lane = 0; lane < 32; lane++) {
        const Thread &from = threads[first + lane];
        if (from.columns != product.b) return product.b = nullptr, product;
        product.sums[lane] = from.sums;
        for (int i = 0; i < 8; i++)
            product.A[(lane >> 2) + i / 2 % 2 * 8][(lane & 3) * 2 + i % 2 + i / 4 * 8] =
                widen(T{}, from.a[i / 2] >> 16 * (i % 2));
    }
    return product;
}
static bool hidden_from_tensor_cores(const uint4 *b) {
    const auto among = [&](const uint4 *place) { return b <= place && place < b + 2 * WARPGROUP_COLUMNS; };
    for (const Thread &thread : threads)
        if (std::any_of(thread.hidden.begin(), thread.hidden.end(), among)) return true;
    return false;
}
// What the lanes of a warp have met to do; a text if they may not.
static std::string go_on_with_products(const std::string &what, int first) {
    Products &own = products[first / 32];
    if (what == "begin products") own.begun = true;
    else if (what == "close products") own.groups.emplace_back(), own.begun = false;
    else if (what == "await products") {
        // The open group is none yet.
        for (; own.groups.size() > threads[first].left + 1; own.groups.pop_front())
            for (const Product &product : own.groups.front()) product.multiply(product);
    } else {
        const Product product = what == "product f16" ? begin_product<Float16>(first) : begin_product<BFloat16>(first);
        if (!own.begun) return "a product that nothing has begun";
        if (!product.b) return "lanes with other columns";
        if (hidden_from_tensor_cores(product.b)) return "columns that tensor cores may not see yet";
        own.groups.back().push_back(product);
    }
    return "";
}

// ---- a launch
constexpr size_t PAGE = 4096, SHARED = 228 * 1024;  // whole pages; the most that devices have
constexpr size_t FORBIDDEN = 16 << 20;              // bytes around what may be touched, for an index far off
alignas(4096) uint4 shared[(SHARED + FORBIDDEN) / 16];
static std::string failure;

// A copy of an array that ends where the next pages may not be touched, but for less than 16 bytes: it begins
// as far from a multiple of 16 as the array, since a device refuses wide accesses to what begins elsewhere.
// What is beyond the array is 0xff.
struct Guarded {
    void *source;
    char *mapped, *base, *data;
    size_t bytes, room;
    Guarded(void *source, size_t bytes) : source(source), bytes(bytes) {
        room = (bytes + 15 + PAGE - 1) / PAGE * PAGE;
        mapped = static_cast<char *>(
            mmap(nullptr, FORBIDDEN + room + FORBIDDEN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        base = mapped + FORBIDDEN;
        mprotect(base, room, PROT_READ | PROT_WRITE);
        std::memset(base, 0xff, room);
        data = base + room - bytes - (0 - bytes - reinterpret_cast<size_t>(source)) % 16;
        std::memcpy(data, source, bytes);
    }
    void release() const { munmap(mapped, FORBIDDEN + room + FORBIDDEN); }
    bool intact() const {
        const auto free = [](char c) { return c == char(0xff); };
        return std::all_of(base, data, free) && std::all_of(data + bytes, base + room, free);
    }
};

static std::vector<Guarded> arrays;
const void *parameters;

// The address that the next kernel gets for an array, which is copied back when the kernel is done.
extern "C" void *guard(void *data, size_t bytes) {
    arrays.emplace_back(data, bytes);
    return arrays.back().data;
}

static void enter() {
    BODY();
    make_copies(0);  // also those that nobody has waited for
    wait(DONE);
}

// Whether all lanes of a warp have met the same operation; it is then done for all.
static bool meet(int first) {
    for (int lane = 0; lane < 32; lane++) {
        const Thread &thread = threads[first + lane];
        if (thread.waits != FOR_WARP) return false;
        if (thread.meets != threads[first].meets) failure = thread.meets + " meets " + threads[first].meets;
    }
    if (!failure.empty()) return false;
    const std::string &what = threads[first].meets;
    if (what == "mma f16") multiply_fragments<Float16>(first);
    else if (what == "mma bf16") multiply_fragments<BFloat16>(first);
    else if (what == "shuffle") {
        float values[32];
        for (int lane = 0; lane < 32; lane++) values[lane] = threads[first + lane].value;
        for (int lane = 0; lane < 32; lane++)
            threads[first + lane].value = values[lane ^ threads[first + lane].lane_mask];
    } else if (what.find("product") != std::string::npos) failure = go_on_with_products(what, first);
    else if (what != "syncwarp") failure = what;
    for (int lane = 0; lane < 32; lane++) threads[first + lane].waits = FOR_NOTHING;
    return true;
}

static void run_block(int count, bool reverse) {
    for (int i = 0; i < count; i++) {
        getcontext(&threads[i].context);
        threads[i].context.uc_stack.ss_sp = &stacks[i * STACK];
        threads[i].context.uc_stack.ss_size = STACK;
        threads[i].context.uc_link = nullptr;
        threads[i].begun = false;
        threads[i].waits = FOR_NOTHING;
        threads[i].groups.assign(1, {});
        threads[i].hidden.clear();
        makecontext(&threads[i].context, enter, 0);
    }
    const int warps = count / 32;
    products.assign(warps, {{{}}, false});
    while (failure.empty()) {
        // A warp goes on until all of its lanes are at a barrier, or at the end; in reverse, warps take turns.
        bool met = false;
        for (int w = 0; w < warps && failure.empty(); w++) {
            const int first = 32 * (reverse ? warps - 1 - w : w);
            bool goes_on;
            do {
                for (int i = 0; i < 32; i++) {
                    current = first + (reverse ? 31 - i : i);
                    threadIdx = {unsigned(current), 0};
                    if (threads[current].waits == FOR_NOTHING) go_on();
                }
                goes_on = meet(first);
                met |= goes_on;
            } while (goes_on && !reverse);
        }
        if (met) continue;
        int done = 0, at_barrier = 0;
        for (int i = 0; i < count; i++) done += threads[i].waits == DONE, at_barrier += threads[i].waits == FOR_BLOCK;
        if (done == count) return;
        if (at_barrier != count) failure = "some threads wait for others that do not come";
        for (int i = 0; i < count; i++) threads[i].waits = FOR_NOTHING;
    }
}

static sigjmp_buf escape;
static void on_fault(int) { siglongjmp(escape, 1); }

// Shared memory that was not asked for may not be touched, but for the rest of a page, where it may be read.
static void run_grid(unsigned width, unsigned height, int count, size_t bytes, bool reverse) {
    gridDim = {width, height};
    char *const first = reinterpret_cast<char *>(shared);
    const size_t room = (bytes + PAGE - 1) / PAGE * PAGE;
    mprotect(first + room, sizeof shared - room, PROT_NONE);
    const unsigned blocks = width * height;
    for (unsigned i = 0; i < blocks && failure.empty(); i++) {
        const unsigned block = reverse ? blocks - 1 - i : i;
        blockIdx = {block % width, block / width};
        std::memset(first, 0xff, room);
        run_block(count, reverse);
        if (!std::all_of(first + bytes, first + room, [](char c) { return c == char(0xff); }))
            failure = "a write beyond the shared memory asked for";
    }
}

// Runs the kernel; returns what went wrong, or an empty string.
extern "C" const char *emulate(unsigned width, unsigned height, int count, size_t bytes, int reverse,
                               const void *values) {
    failure = bytes > SHARED ? "more shared memory than there is" : "";
    if (threads.size() < size_t(count)) threads.resize(count);
    stacks.reset(new char[count * STACK]);
    parameters = values;

    struct sigaction action = {}, before;
    action.sa_handler = on_fault;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, &before);
    if (sigsetjmp(escape, 1)) failure = "an access outside an array";
    else if (failure.empty()) run_grid(width, height, count, bytes, reverse);
    sigaction(SIGSEGV, &before, nullptr);
    mprotect(shared, sizeof shared, PROT_READ | PROT_WRITE);

    for (const Guarded &array : arrays) {
        if (!array.intact()) failure = "a write outside an array";
        std::memcpy(array.source, array.data, array.bytes);
        array.release();
    }
    arrays.clear();
    stacks.reset();
    return failure.c_str();
}
