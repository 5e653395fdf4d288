// The loop that every instruction set's description is put into.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "probe/probe.h"

namespace biomedgpt {

// Twelve independent sums hide a latency of four cycles on three units, and with two operands they fit 16 registers.
constexpr size_t kSums = 12;

// `Isa` has types Sum and Operand, zero(), ones(), add(sum, a, b) -> sum plus products, total(sum) -> double, and
// kProducts, how many products an add() makes.
template <class Isa, size_t... kIndex>
double run_steps(int64_t steps, std::index_sequence<kIndex...>) {
    typename Isa::Sum sums[] = {(static_cast<void>(kIndex), Isa::zero())...};
    const typename Isa::Operand a = Isa::ones(), b = Isa::ones();
    for (int64_t step = 0; step < steps; ++step) ((sums[kIndex] = Isa::add(sums[kIndex], a, b)), ...);
    return (Isa::total(sums[kIndex]) + ...);
}

template <class Isa>
double run_loop(int64_t steps) {
    return run_steps<Isa>(steps, std::make_index_sequence<kSums>());
}

template <class Isa>
constexpr ArithmeticLoop loop_of(const char* name, const char* kind) {
    return {name, kind, 2 * static_cast<int64_t>(kSums) * Isa::kProducts, &run_loop<Isa>};
}

// A number that the compiler does not know. A factor that it knew to be one would be left out, and sums that it knew to
// begin alike would become a single one.
template <typename Number>
Number opaque(Number number) {
    volatile Number hidden = number;
    return hidden;
}

template <typename Lane, size_t kLanes>
double sum_of(const Lane (&lanes)[kLanes]) {
    double sum = 0;
    for (const Lane lane : lanes) sum += static_cast<double>(lane);
    return sum;
}

}  // namespace biomedgpt
