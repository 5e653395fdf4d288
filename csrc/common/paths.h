// The instruction-set paths of an op that this machine can run, best first, and the choice among them by name.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "common/error.h"

namespace biomedgpt {

// `Path` has a `name`.
template <class Path>
class PathList {
  public:
    void add(const Path& path) { paths_.push_back(&path); }

    // Throws ArgumentError where there is no path of this name; "auto" is the first.
    const Path& choose(std::string_view name) const {
        if (name == "auto") return *paths_.front();
        for (const Path* path : paths_) {
            if (name == path->name) return *path;
        }
        std::string known;
        for (const Path* path : paths_) known += std::string(", \"") + path->name + "\"";
        throw ArgumentError("path", "\"" + std::string(name) + "\"", "\"auto\"" + known);
    }

    std::vector<const char*> names() const {
        std::vector<const char*> all;
        for (const Path* path : paths_) all.push_back(path->name);
        return all;
    }

  private:
    std::vector<const Path*> paths_;
};

}  // namespace biomedgpt
