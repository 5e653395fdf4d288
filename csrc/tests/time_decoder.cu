// For a GPU.
#include "time_decoder.cpp"
