// A test is a program that returns report(): 0 if every CHECK held.
#pragma once

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>

#include "hpa/runtime.h"

namespace hpa::test {

inline int failures = 0;

inline void check(bool condition, const char* text, const char* file, int line, const std::string& context) {
  if (condition) return;
  if (++failures <= 20) std::fprintf(stderr, "%s:%d: %s  [%s]\n", file, line, text, context.c_str());
}

#define CHECK(condition, context) ::hpa::test::check((condition), #condition, __FILE__, __LINE__, (context))

// The argument is refused, and the message names it.
inline bool refused(const Status& status, const char* argument) {
  return status.code == StatusCode::invalid_argument && std::strstr(status.message, argument) != nullptr;
}

// Runs the body once for each instruction set of this machine, and puts the fastest back.
inline void for_each_instruction_set(const std::function<void(const std::string&)>& body) {
  const std::string names = cpu::available_instruction_sets();
  for (std::size_t begin = 0; begin <= names.size();) {
    const std::size_t end = std::min(names.find(',', begin), names.size());
    const std::string name = names.substr(begin, end - begin);
    CHECK(cpu::set_instruction_set(name.c_str()).ok(), name);
    body(name);
    begin = end + 1;
  }
}

inline int report(const char* name) {
  std::printf("%s: %s\n", name, failures == 0 ? "passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}

}  // namespace hpa::test
