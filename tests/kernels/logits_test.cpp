// Logits of all rows of a table, and of some.

#include "kernel_test.h"

namespace bitnet_ops {
namespace kernel_test {
namespace {

template <class T>
void test_logits_of() {
  Random random;
  for (const int64_t in_features : {0, 1, 63, 64, 65, 100, 320}) {
    for (const int64_t tokens : {1, 2, 3, 4, 6, 7, 13}) {
      for (const int64_t vocabulary : {1, 3, 4, 9, 21}) {
        const int64_t stride = (in_features + kVirtualLanes - 1) / kVirtualLanes * kVirtualLanes;
        const int64_t begin = vocabulary > 9 ? 8 : 0;  // the part of one thread
        Buffer<float> x(tokens * stride), scratch(kLogitsScratchRows * stride);
        Buffer<T> weight(vocabulary * in_features);
        for (int64_t t = 0; t < tokens; ++t) fill_row(x.data + t * stride, in_features, kRandom, random);
        fill_row(weight.data, vocabulary * in_features, kRandom, random);
        Buffer<float> out[2] = {Buffer<float>(tokens * vocabulary), Buffer<float>(tokens * vocabulary)};
        for (int i = 0; i < 2; ++i) {
          const Logits logits{x.data, stride, tokens, weight.data, dtype_of<T>(), in_features, vocabulary, out[i].data};
          (i == 0 ? scalar : tested)->logits(logits, begin, vocabulary, scratch.data);
        }
        compare(
            out[0], out[1],
            "logits " + std::to_string(tokens) + "x" + std::to_string(in_features) + "x" + std::to_string(vocabulary));
      }
    }
  }
}

template <class T>
void test_logits_of_rows() {
  Random random;
  for (const int64_t in_features : {1, 64, 100, 320}) {
    for (const int64_t count : {1, 2, 3, 20}) {
      const int64_t vocabulary = 21;
      const int64_t stride = (in_features + kVirtualLanes - 1) / kVirtualLanes * kVirtualLanes;
      Buffer<float> x(stride), scratch(kLogitsScratchRows * stride), all(vocabulary);
      Buffer<T> weight(vocabulary * in_features);
      fill_row(x.data, in_features, kRandom, random);
      fill_row(weight.data, vocabulary * in_features, kRandom, random);
      const Logits logits{x.data, stride, 1, weight.data, dtype_of<T>(), in_features, vocabulary, all.data};
      scalar->logits(logits, 0, vocabulary, scratch.data);
      Buffer<int32_t> rows(count);
      Buffer<float> out[2] = {Buffer<float>(count), Buffer<float>(count)};
      for (int64_t i = 0; i < count; ++i) {
        rows.data[i] = static_cast<int32_t>(random.byte() % vocabulary);
        out[0].data[i] = all.data[rows.data[i]];
      }
      tested->logits_of_rows(logits, rows.data, count, out[1].data, scratch.data);
      compare(out[0], out[1], "logits_of_rows, " + std::to_string(count) + " of " + std::to_string(in_features));
    }
  }
}

}  // namespace

void test_logits() {
  test_logits_of<float>();
  test_logits_of<BFloat16>();
  test_logits_of<Float16>();
  test_logits_of_rows<float>();
  test_logits_of_rows<BFloat16>();
  test_logits_of_rows<Float16>();
}

}  // namespace kernel_test
}  // namespace bitnet_ops
