// A static split of a job over threads that wait between calls without using a processor.
#pragma once

#include <cstdint>
#include <type_traits>

namespace biomedgpt {

// How many parts a job of `operations` elementary operations is worth, at most `threads` and at most `items`.
int worthwhile_parts(int threads, int64_t items, int64_t operations);

// A reference to a callable, valid during the call it is passed to; unlike std::function it never allocates.
class PartBody {
  public:
    // A template that is not meant for copies of PartBody itself.
    template <typename Body, typename = std::enable_if_t<!std::is_same_v<std::decay_t<Body>, PartBody>>>
    PartBody(const Body& body)  // NOLINT: implicit, so that a lambda can be passed
        : object_(&body), call_([](const void* object, int part) { (*static_cast<const Body*>(object))(part); }) {}

    void operator()(int part) const { call_(object_, part); }

  private:
    const void* object_;
    void (*call_)(const void*, int);
};

// Calls body(part) once for each part below `parts`, part 0 in the calling thread. `body` must not throw, and what it
// computes for an item must not depend on the part: that makes results equal for any thread count. A call that finds
// the threads in use by another one does all of its parts itself, so the processor is never asked for more threads
// than one call may use.
void for_parts(int parts, PartBody body);

// The first item of a part when `items` are divided evenly; that of part + 1 is its end.
inline int64_t first_item(int64_t items, int part, int parts) {
    return items * part / parts;
}

}  // namespace biomedgpt
