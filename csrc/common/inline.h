// BIOMEDGPT_INLINE before a function that files for several instruction sets share. A copy that one of them leaves to
// the linker may be the one that runs on every processor.
#pragma once

#define BIOMEDGPT_INLINE __attribute__((always_inline)) inline
