// Kernels of one row: quantisation, RMSNorm, widening, gated linear units.

#include "kernel_test.h"

namespace bitnet_ops {
namespace kernel_test {
namespace {

// 0, one lane, around every register width, around 64 virtual lanes, and a few longer ones.
const int64_t kLengths[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 200, 257, 640};

template <class T>
void test_rows_of() {
  Random random;
  for (const int64_t length : kLengths) {
    for (int kind = 0; kind < kRowKinds; ++kind) {
      const std::string where = " of " + std::to_string(length) + ", kind " + std::to_string(kind) + ", dtype " +
                                std::to_string(static_cast<int>(dtype_of<T>()));
      Buffer<T> x(length);
      fill_row(x.data, length, static_cast<RowKind>(kind), random);
      for (const int64_t q_length : {length, (length + 63) / 64 * 64}) {
        Buffer<int8_t> q[2] = {Buffer<int8_t>(q_length), Buffer<int8_t>(q_length)};
        Buffer<float> x_scale[2] = {Buffer<float>(1), Buffer<float>(1)};
        Buffer<int32_t> q_sum[2] = {Buffer<int32_t>(1), Buffer<int32_t>(1)};
        for (int i = 0; i < 2; ++i) {
          std::memset(q[i].data, 0x7b, q[i].count);  // padding must be written, not assumed
          (i == 0 ? scalar : tested)
              ->quantize_row(x.data, dtype_of<T>(), length, q[i].data, q_length, x_scale[i].data, q_sum[i].data);
        }
        compare(q[0], q[1], "quantize_row q" + where);
        compare(x_scale[0], x_scale[1], "quantize_row x_scale" + where);
        compare(q_sum[0], q_sum[1], "quantize_row q_sum" + where);

        Buffer<int8_t> hi[2] = {Buffer<int8_t>(q_length), Buffer<int8_t>(q_length)};
        Buffer<int8_t> lo[2] = {Buffer<int8_t>(q_length), Buffer<int8_t>(q_length)};
        Buffer<int32_t> sums[2] = {Buffer<int32_t>(2), Buffer<int32_t>(2)};
        for (int i = 0; i < 2; ++i) {
          std::memset(hi[i].data, 0x7b, hi[i].count);
          std::memset(lo[i].data, 0x7b, lo[i].count);
          (i == 0 ? scalar : tested)
              ->quantize_row_16(x.data, dtype_of<T>(), length, hi[i].data, lo[i].data, q_length, x_scale[i].data,
                                sums[i].data);
        }
        compare(hi[0], hi[1], "quantize_row_16 hi" + where);
        compare(lo[0], lo[1], "quantize_row_16 lo" + where);
        compare(x_scale[0], x_scale[1], "quantize_row_16 x_scale" + where);
        compare(sums[0], sums[1], "quantize_row_16 sums" + where);
      }
      Buffer<float> weight(length);
      fill_row(weight.data, length, kRandom, random);
      Buffer<T> y[2] = {Buffer<T>(length), Buffer<T>(length)};
      Buffer<float> wide[2] = {Buffer<float>(length + 5), Buffer<float>(length + 5)};
      for (int i = 0; i < 2; ++i) {
        const KernelTable* table = i == 0 ? scalar : tested;
        table->rms_norm_row(x.data, dtype_of<T>(), weight.data, 1e-5f, length, y[i].data);
        std::memset(wide[i].data, 0x7b, wide[i].count * sizeof(float));
        table->widen_row(x.data, dtype_of<T>(), length, wide[i].data, length + 5);
      }
      compare(y[0], y[1], "rms_norm_row" + where);
      compare(wide[0], wide[1], "widen_row" + where);
    }
  }
}

// Every 16-bit pattern to float32, NaN payloads included.
template <class T>
void test_widening_every_value() {
  Buffer<T> x(65536);
  for (int64_t i = 0; i < 65536; ++i) x.data[i].bits = static_cast<uint16_t>(i);
  Buffer<float> wide[2] = {Buffer<float>(65536), Buffer<float>(65536)};
  scalar->widen_row(x.data, dtype_of<T>(), 65536, wide[0].data, 65536);
  tested->widen_row(x.data, dtype_of<T>(), 65536, wide[1].data, 65536);
  ++comparisons;
  if (std::memcmp(wide[0].data, wide[1].data, 65536 * sizeof(float)) != 0) report("widening of every value");
}

const char* const kActivationNames[] = {"relu2", "silu", "gelu_tanh"};

void test_glu_row(Activation activation, const Buffer<float>& gate, const Buffer<float>& up, const std::string& where) {
  const int64_t count = static_cast<int64_t>(gate.count);
  const std::string what = std::string("glu_row ") + kActivationNames[static_cast<int>(activation)] + where;
  Buffer<float> expected(count), given(count), over_gate(count), over_up(count);
  scalar->glu_row(activation, gate.data, up.data, expected.data, count);
  tested->glu_row(activation, gate.data, up.data, given.data, count);
  compare(expected, given, what);
  for (int64_t i = 0; i < count; ++i) {
    over_gate.data[i] = gate.data[i];
    over_up.data[i] = up.data[i];
  }
  tested->glu_row(activation, over_gate.data, up.data, over_gate.data, count);
  tested->glu_row(activation, gate.data, over_up.data, over_up.data, count);
  compare(expected, over_gate, what + " over gate");
  compare(expected, over_up, what + " over up");
}

void test_glu() {
  Random random;
  for (const Activation activation : {Activation::kRelu2, Activation::kSilu, Activation::kGeluTanh}) {
    for (const int64_t length : kLengths) {
      for (int kind = 0; kind < kRowKinds; ++kind) {
        Buffer<float> gate(length), up(length);
        fill_row(gate.data, length, static_cast<RowKind>(kind), random);
        fill_row(up.data, length, static_cast<RowKind>((kind + static_cast<int>(length)) % kRowKinds), random);
        test_glu_row(activation, gate, up, " of " + std::to_string(length) + ", kind " + std::to_string(kind));
      }
    }
    // Every sign, exponent and first bits, with an odd rest: subnormal, infinite, NaN, and all arguments of exp.
    Buffer<float> gate(65536), up(65536);
    for (uint32_t i = 0; i < 65536; ++i) {
      gate.data[i] = bits_float(i << 16 | (i % 3 == 0 ? 0 : static_cast<uint32_t>(random.next() >> 48)));
      up.data[i] = i % 5 == 0 ? random.uniform() : bits_float(static_cast<uint32_t>(random.next() >> 32));
    }
    test_glu_row(activation, gate, up, " of every exponent");
  }
}

}  // namespace

void test_rows() {
  test_glu();
  test_rows_of<float>();
  test_rows_of<BFloat16>();
  test_rows_of<Float16>();
  test_widening_every_value<BFloat16>();
  test_widening_every_value<Float16>();
}

}  // namespace kernel_test
}  // namespace bitnet_ops
