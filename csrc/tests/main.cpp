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

// Runs all cases, or those whose names hold one of the arguments.
int main(int count, char** arguments) {
    const auto wanted = [&](const std::string& name) {
        bool found = count == 1;
        for (int i = 1; i < count; ++i) found = found || name.find(arguments[i]) != name.npos;
        return found;
    };
    size_t run = 0;
    for (const auto& test : biomedgpt::testing::cases()) {
        if (!wanted(test.name)) continue;
        ++run;
        try {
            test.run();
        } catch (const std::exception& error) {
            biomedgpt::testing::fail(test.name.c_str(), 0, std::string("exception: ") + error.what());
        }
    }
    std::printf("%zu cases, %d failures\n", run, biomedgpt::testing::failures);
    return biomedgpt::testing::failures == 0 && run > 0 ? 0 : 1;
}
