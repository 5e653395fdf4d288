// Fibers by ucontext: POSIX systems have it, and blocks are emulated in tests alone.
#include "simt/simt_host.h"

#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

namespace biomedgpt {
inline namespace on_host {
namespace simt {
namespace {

constexpr size_t kStackBytes = size_t{64} << 10;
constexpr unsigned char kPoison = 0xff;  // NaN, of halves and floats
constexpr size_t kGuardQuads = 64;       // behind shared memory

enum class State { ready, at_warp, at_block, done };

struct Copy {
    void* to;
    const void* from;
    bool there;
    int group;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Place place;
    State state = State::ready;
    std::vector<Copy> copies;
    int groups = 0;     // committed
    int exchanges = 0;  // of its warp, so far
};

struct Block {
    ucontext_t scheduler;
    std::vector<Fiber> fibers;
    size_t shared_bytes = 0;
    std::vector<Quad> memory;
    std::vector<Shown> shown[2];  // by warp
    const std::function<void()>* kernel = nullptr;
    Fiber* running = nullptr;
    std::exception_ptr error;
    std::minstd_rand random{1};
};

thread_local Block block;

void enter() {
    try {
        (*block.kernel)();
    } catch (...) {
        block.error = std::current_exception();
    }
    block.running->state = State::done;
    // The fiber's context has a link to the scheduler, which goes on.
}

void wait_as(State state) {
    Fiber& fiber = *block.running;
    fiber.state = state;
    swapcontext(&fiber.context, &block.scheduler);
}

void resume(Fiber& fiber) {
    block.running = &fiber;
    swapcontext(&block.scheduler, &fiber.context);
    block.running = nullptr;
}

void prepare(int threads, size_t shared_bytes, const Place& at) {
    const auto count = static_cast<size_t>(threads);
    if (block.fibers.size() < count) block.fibers.resize(count);
    block.shared_bytes = shared_bytes;
    block.memory.resize(shared_bytes / sizeof(Quad) + kGuardQuads);
    std::memset(static_cast<void*>(block.memory.data()), kPoison, block.memory.size() * sizeof(Quad));
    for (auto& shown : block.shown) shown.resize((count + kWarpSize - 1) / kWarpSize);
    for (size_t i = 0; i < count; ++i) {
        Fiber& fiber = block.fibers[i];
        if (fiber.stack == nullptr) fiber.stack = std::make_unique<char[]>(kStackBytes);
        fiber.place = at;
        fiber.place.thread = static_cast<int>(i);
        fiber.state = State::ready;
        fiber.copies.clear();
        fiber.groups = fiber.exchanges = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = &block.scheduler;
        makecontext(&fiber.context, enter, 0);
    }
}

void arrive(const Copy& copy) {
    if (copy.there) {
        std::memcpy(copy.to, copy.from, sizeof(Quad));
    } else {
        std::memset(copy.to, 0, sizeof(Quad));
    }
}

// What lies behind the memory that a kernel asked for is nobody's.
void require_guard() {
    const auto* memory = reinterpret_cast<const unsigned char*>(block.memory.data());
    for (size_t i = block.shared_bytes; i < block.memory.size() * sizeof(Quad); ++i) {
        if (memory[i] != kPoison) throw std::logic_error("a write behind the shared memory of a block");
    }
}

// Threads that have ended count as arrived at a block's barrier, and never at a warp's.
bool release(size_t begin, size_t end, State waiting, bool ended_count) {
    for (size_t i = begin; i < end; ++i) {
        const State state = block.fibers[i].state;
        if (state != waiting && !(ended_count && state == State::done)) return false;
    }
    bool any = false;
    for (size_t i = begin; i < end; ++i) {
        if (block.fibers[i].state != waiting) continue;
        block.fibers[i].state = State::ready;
        any = true;
    }
    return any;
}

void run_block(size_t threads) {
    std::vector<size_t> order(threads);
    std::iota(order.begin(), order.end(), size_t{0});
    for (;;) {
        std::shuffle(order.begin(), order.end(), block.random);
        bool ran = false;
        for (const size_t i : order) {
            if (block.fibers[i].state != State::ready) continue;
            resume(block.fibers[i]);
            if (block.error != nullptr) std::rethrow_exception(std::exchange(block.error, nullptr));
            ran = true;
        }
        bool released = false;
        for (size_t begin = 0; begin < threads; begin += kWarpSize) {
            released |= release(begin, std::min(begin + kWarpSize, threads), State::at_warp, false);
        }
        released |= release(0, threads, State::at_block, true);
        if (ran || released) continue;
        for (size_t i = 0; i < threads; ++i) {
            if (block.fibers[i].state != State::done) throw std::logic_error("a barrier that some threads never reach");
        }
        return;
    }
}

}  // namespace

const Place& place() {
    return block.running->place;
}

void run_grid(const Grid& grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    block.kernel = &kernel;
    const int count = grid.x * grid.y * grid.z;
    std::vector<int> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    // No block may count on another one to have run before.
    std::shuffle(order.begin(), order.end(), block.random);
    for (const int i : order) {
        prepare(threads, shared_bytes, {0, i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y});
        run_block(static_cast<size_t>(threads));
        require_guard();
    }
}

void sync_block() {
    wait_as(State::at_block);
}

void sync_warp() {
    wait_as(State::at_warp);
}

char* shared() {
    return reinterpret_cast<char*>(block.memory.data());
}

const Shown& exchange(const uint32_t (&words)[kExchanged]) {
    // By turns in two places: nobody writes the first again before all have come to the second, and so read the first.
    Fiber& fiber = *block.running;
    Shown& shown = block.shown[fiber.exchanges++ % 2][static_cast<size_t>(warp())];
    std::copy(words, words + kExchanged, shown.lanes[lane()]);
    sync_warp();
    return shown;
}

void copy_async(void* to, const void* from, bool there) {
    if (reinterpret_cast<uintptr_t>(to) % sizeof(Quad) != 0 || (there && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
        throw std::logic_error("an asynchronous copy from or to an address that is no multiple of 16");
    }
    const Copy copy = {to, from, there, block.running->groups};
    // As soon or as late as it may: one finds who overwrites what is still read, the other who reads too early.
    if (block.random() % 2 == 0) {
        arrive(copy);
    } else {
        block.running->copies.push_back(copy);
    }
}

void require_row(uintptr_t address) {
    const auto begin = reinterpret_cast<uintptr_t>(block.memory.data());
    if (address % 16 != 0 || address < begin || address + 16 > begin + block.shared_bytes) {
        throw std::logic_error("a row of a matrix that does not lie in shared memory, or at no multiple of 16");
    }
}

void commit_copies() {
    ++block.running->groups;
}

void wait_for_copies(int but) {
    Fiber& fiber = *block.running;
    auto& copies = fiber.copies;
    const int arrived = fiber.groups - but;
    for (const Copy& copy : copies) {
        if (copy.group < arrived) arrive(copy);
    }
    copies.erase(std::remove_if(copies.begin(), copies.end(), [=](const Copy& copy) { return copy.group < arrived; }),
                 copies.end());
}

}  // namespace simt
}  // namespace on_host
}  // namespace biomedgpt
