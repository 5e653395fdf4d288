#include <cstdio>
#include <exception>

#include "runner.h"

namespace biomedgpt::testing {

static int failures = 0;

std::vector<Case>& cases() {
    static std::vector<Case> registered;  // in a function, so that it exists before the first registration
    return registered;
}

void fail(const char* file, int line, const std::string& what) {
    ++failures;
    std::printf("%s:%d: failed: %s\n", file, line, what.c_str());
}

}  // namespace biomedgpt::testing

int main() {
    using biomedgpt::testing::cases;
    for (const auto& test : cases()) {
        try {
            test.run();
        } catch (const std::exception& error) {
            biomedgpt::testing::fail(test.name.c_str(), 0, std::string("exception: ") + error.what());
        }
    }
    std::printf("%zu cases, %d failures\n", cases().size(), biomedgpt::testing::failures);
    return biomedgpt::testing::failures == 0 ? 0 : 1;
}
