// BIOMEDGPT_UNROLL before a loop of constant length. Sums live in registers only if the loops over them are unrolled,
// and compilers give up beyond 16 rounds.
#pragma once

#if defined(__clang__)
#define BIOMEDGPT_UNROLL _Pragma("unroll")
#else
#define BIOMEDGPT_UNROLL _Pragma("GCC unroll 32")
#endif
