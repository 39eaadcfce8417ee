// Numbers as the sentences of errors have them, written by no stream: where a toolchain links the
// C++ library statically, the extension has one of its own, whose streams cannot format numbers
// beside the one that torch has loaded.
#pragma once

#include <c10/util/ArrayRef.h>

#include <clocale>
#include <cstdio>
#include <string>

namespace ddpm_fast {

inline std::string text(int64_t number) { return std::to_string(number); }

inline std::string text(double number) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", number);
  std::string text = digits;
  const std::string point = std::localeconv()->decimal_point;
  if (const auto place = text.find(point); place != std::string::npos) {
    text.replace(place, point.size(), ".");
  }
  return text;
}

inline std::string text(c10::IntArrayRef numbers) {
  std::string list;
  for (const int64_t number : numbers) list += (list.empty() ? "" : ", ") + text(number);
  return "[" + list + "]";
}

}  // namespace ddpm_fast
