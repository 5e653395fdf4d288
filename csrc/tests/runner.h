// A test runner of one screen: TEST registers a case, CHECK reports a failure and goes on.
#pragma once

#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace biomedgpt::testing {

struct Case {
    std::string name;
    std::function<void()> run;
};

// Of random numbers: the same in every run, unless a run asks for others.
inline unsigned seed(unsigned of_test) {
    const char* given = std::getenv("BIOMEDGPT_TEST_SEED");
    return of_test + (given == nullptr ? 0 : static_cast<unsigned>(std::strtoul(given, nullptr, 10)));
}

std::vector<Case>& cases();
void fail(const char* file, int line, const std::string& what);

struct Registration {
    Registration(const char* name, std::function<void()> run) { cases().push_back({name, std::move(run)}); }
};

}  // namespace biomedgpt::testing

#define TEST(name)                                                                         \
    static void test_##name();                                                             \
    static const biomedgpt::testing::Registration registration_##name(#name, test_##name); \
    static void test_##name()

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) biomedgpt::testing::fail(__FILE__, __LINE__, #condition); \
    } while (false)
