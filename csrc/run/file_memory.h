// Rows of a matrix that is a mapped file, without mapping the pages they lie in.
//
// A decoded token needs a few rows of a table of some hundred megabytes: its embedding, and the tokens that may win.
// Read through a mapping, each of them brings a whole folio of the page cache (up to 2 MB) into the process, so that
// soon all of the table is resident. Read with pread, they cost a system call each and no memory.
//
// A pass over a whole matrix reads it through the mapping, unless whoever mapped the file would rather have the memory:
// then most of the matrix is read block by block (kStays).
//
// The result is always what the memory holds. The mapping is private, so what a program writes to it is in its memory
// alone: a page that is there, changed or not, is read from memory, and only one that is not there from the file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "platform/system.h"

namespace bitnet_ops {

// Says that memory [begin, begin + bytes) is a private mapping of a file from its first byte on. Takes over the
// descriptor, in any case. `begin` is a multiple of the page size. `sparing`: passes over whole matrices shall not
// bring all of them into memory.
void add_file_memory(const void* begin, size_t bytes, int descriptor, bool sparing);

// Takes it back and closes the descriptor, before the mapping ends. Does nothing where it is not known.
void remove_file_memory(const void* begin);

// Some rows of one matrix, for several threads at a time: for the duration of one call, in which nobody writes to the
// matrix.
class FileRows {
 public:
  // Looks whether the matrix lies in a mapped file, and where a page of it is in memory.
  //   rows       of the matrix
  //   row_bytes  of each
  //   wanted     about how many will be copied: what is worth finding out for all of them at once
  FileRows(const void* matrix, int64_t rows, size_t row_bytes, int64_t wanted);

  bool in_file() const { return descriptor_ >= 0; }

  // Some rows that follow each other, only where in_file(). Throws std::runtime_error where the file ends before.
  void copy(int64_t row, int64_t count, char* out) const;

  // Whether a pass over the whole matrix has to ask `in_memory` for each block of rows.
  bool sparing() const { return sparing_; }

  // Rows that follow each other where they may be read through the mapping: all of them are in memory already, or
  // `may_stay` and they are of those that may. Null elsewhere.
  const char* in_memory(int64_t row, int64_t count, bool may_stay) const;

 private:
  const char* matrix_;
  size_t row_bytes_;
  int64_t offset_ = 0;  // of the matrix in the file
  int descriptor_ = -1;
  bool sparing_ = false;
  static constexpr int kMostRanges = 64;
  ByteRange resident_[kMostRanges];
  int ranges_ = -1;  // of resident_; -1: not known, each row has to be looked at

  bool is_absent(uintptr_t begin, uintptr_t end) const;
  bool is_resident(uintptr_t begin, uintptr_t end) const;
};

}  // namespace bitnet_ops
