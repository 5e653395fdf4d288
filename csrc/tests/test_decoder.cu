// The same tests for a GPU.
#include "test_decoder.cpp"
