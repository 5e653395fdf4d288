// The two errors the kernel library throws. Neither knows Python; the binding translates them.
#pragma once

#include <stdexcept>
#include <string>

namespace biomedgpt {

// An argument has the wrong shape, dtype, memory layout or value. Thrown before anything is written.
class ArgumentError : public std::invalid_argument {
  public:
    ArgumentError(const std::string& argument, const std::string& given, const std::string& expected)
        : std::invalid_argument(argument + ": got " + given + ", expected " + expected + "."), given_(given) {}

    const std::string& given() const noexcept { return given_; }

  private:
    std::string given_;
};

// A call into the accelerator's runtime failed. What was being written is undefined.
class DeviceError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

}  // namespace biomedgpt
