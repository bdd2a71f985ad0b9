#include "ops/decoder.h"

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "ops/attention.h"
#include "ops/packed_checks.h"
#include "platform/system.h"
#include "run/attention.h"
#include "run/decoder.h"

namespace bitnet_ops {
namespace {

constexpr const char* kOp = "decoder_layers";

constexpr const char* kLayouts[] = {"tile16", "tile16_base3", "row", "column"};
constexpr const char* kProjectionNames[kProjections] = {"q", "k", "v", "o", "gate", "up", "down"};
constexpr const char* kNormNames[kNorms] = {"input_norm",
                                            "query_norm",
                                            "key_norm",
                                            "attention_sub_norm",
                                            "attention_post_norm",
                                            "feed_forward_norm",
                                            "feed_forward_sub_norm",
                                            "feed_forward_post_norm"};

// What bitnet_ops/decoder/plan.py wrote down of the layers: three lists, read in order.
struct Plan {
  std::vector<Tensor> weights;
  std::vector<int64_t> structure;
  std::vector<double> constants;
};

class PlanReader {
 public:
  explicit PlanReader(const Plan& plan) : plan_(plan) {}

  bool at_end() const {
    return weight_ == plan_.weights.size() && number_ == plan_.structure.size() && constant_ == plan_.constants.size();
  }
  bool has_more() const { return number_ < plan_.structure.size(); }

  const Tensor& weight() { return next("weights", plan_.weights, weight_); }
  int64_t number() { return next("structure", plan_.structure, number_); }
  double constant() { return next("constants", plan_.constants, constant_); }

  int64_t number(const std::string& what, int64_t low, int64_t high) {
    const int64_t value = number();
    if (value < low || value > high) {
      refuse(kOp, ("structure: " + what).c_str(),
             "a number from " + std::to_string(low) + " to " + std::to_string(high), std::to_string(value));
    }
    return value;
  }

 private:
  template <class T>
  static const T& next(const char* argument, const std::vector<T>& list, size_t& place) {
    if (place >= list.size()) {
      refuse(kOp, argument, "as many elements as the structure asks for", std::to_string(list.size()));
    }
    return list[place++];
  }

  const Plan& plan_;
  size_t weight_ = 0, number_ = 0, constant_ = 0;
};

// The same memory as another tensor.
Tensor alias_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t offset;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), tensor.dim(), sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

Tensor first_of(const Tensor& all) { return select(all, 0, 0); }

std::optional<Tensor> first_of(const std::optional<Tensor>& all) {
  return all.has_value() ? std::optional<Tensor>(first_of(*all)) : std::nullopt;
}

// Layers, checked once and then run any number of times.
class CheckedLayers {
 public:
  // Throws what an operator throws at wrong arguments.
  explicit CheckedLayers(const Plan& plan) {
    PlanReader reader(plan);
    do {
      read_layer(reader);
    } while (reader.has_more());
    if (!reader.at_end()) refuse(kOp, "weights and constants", "no more elements than the structure asks for", "more");
  }

  // Whether the tensors still have the memory that was checked: somebody may have given them other.
  bool is_current() const {
    if (copied_) return false;  // of what may have changed since
    for (const Memory& memory : memory_) {
      if (data<void>(memory.given) != memory.address) return false;
    }
    return true;
  }

  // The operator. Keys and values are changed in place.
  Tensor run(const Tensor& x_any, const Tensor& cos_any, const Tensor& sin_any, const std::optional<Tensor>& start_any,
             const std::optional<Tensor>& keys, const std::optional<Tensor>& values,
             const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale, int64_t slot) const {
    const int64_t hidden_size = layers_[0].projections[kQ].matrix.size.in_features;
    if (!x_any.is_cpu() || dtype_code(x_any) != dtypes().float32 || x_any.dim() != 3 || x_any.size(2) != hidden_size) {
      refuse(kOp, "x", "a tensor float32 [batch, tokens, " + std::to_string(hidden_size) + "] on the CPU",
             describe(x_any));
    }
    if (cos_any.dim() != 3 || cos_any.size(0) < rotations_) {
      refuse(kOp, "cos",
             "a CPU tensor float32 [tables, positions, head_dim / 2] of at least " + std::to_string(rotations_) +
                 " tables",
             describe(cos_any));
    }
    check(kOp, "sin", sin_any, dtypes().float32, {cos_any.size(0), cos_any.size(1), cos_any.size(2)});
    const int64_t head_dim = check_tables(kOp, first_of(cos_any), first_of(sin_any));
    const int64_t batch = x_any.size(0), tokens = x_any.size(1);
    if (start_any.has_value()) check(kOp, "start", *start_any, dtypes().int64, {batch});
    const Tensor x = as_contiguous(x_any);
    const Tensor cos = as_contiguous(cos_any);
    const Tensor sin = as_contiguous(sin_any);
    std::vector<int64_t> start(static_cast<size_t>(batch), 0);
    if (start_any.has_value() && batch > 0) {
      const Tensor given = as_contiguous(*start_any);
      start.assign(data<int64_t>(given), data<int64_t>(given) + batch);
    }
    const AttentionSizes sizes{batch, tokens, 1, 1, head_dim};
    for (const Layer& layer : layers_) check_heads(layer, head_dim);
    std::optional<Tensor> own_keys, own_values;  // of one layer after another, where there is no cache
    const LayersCache cache = keys.has_value()
                                  ? checked_cache(sizes, *keys, values, key_scale, value_scale, slot)
                                  : cache_for_this_call(sizes, values, key_scale, value_scale, own_keys, own_values);
    check_positions(kOp, start.data(), sizes, cos.size(1), keys.has_value() ? cache.capacity : tokens);
    const Tensor out = empty(shape_of(x), dtypes().float32);
    if (batch * tokens == 0 || hidden_size == 0) return out;
    const TokenPositions positions{
        batch, tokens, start.data(), data<float>(cos), data<float>(sin), cos.size(1) * cos.size(2)};
    run_layers(layers_.data(), layers_.size(), positions, cache, slot, data<float>(x), mutable_data<float>(out));
    return out;
  }

 private:
  struct Memory {
    Tensor given;
    Tensor kept;  // the same memory, which thus stays when `given` gets other; or a contiguous copy
    const void* address;
  };

  void keep(const Tensor& given, const Tensor& used) {
    const bool copied = data<void>(given) != data<void>(used);
    copied_ = copied_ || copied;
    memory_.push_back({given, copied ? used : alias_of(given), data<void>(given)});
  }

  Norm read_norm(PlanReader& reader, const std::string& name, int64_t features) {
    const Tensor& weight = reader.weight();
    const double eps = reader.constant();
    check(kOp, name.c_str(), weight, dtypes().float32, {features});
    if (!(eps >= 0.0)) refuse(kOp, (name + ".eps").c_str(), "a number of at least 0", std::to_string(eps));
    const Tensor used = as_contiguous(weight);
    keep(weight, used);
    return {data<float>(used), static_cast<float>(eps)};
  }

  Projection read_projection(PlanReader& reader, const std::string& name) {
    Projection projection;
    const bool normed = reader.number(name + ".has_norm", 0, 1) == 1;
    ProjectionOptions options;
    options.size.out_features = reader.number();
    options.size.in_features = reader.number();
    check_size(kOp, (name + ".in_features").c_str(), options.size.in_features);
    options.layout = kLayouts[reader.number(name + ".layout", 0, 3)];
    options.activation_bits = reader.number();
    options.group_size = reader.number();
    const bool biased = reader.number(name + ".has_bias", 0, 1) == 1;
    if (normed) projection.norm = read_norm(reader, name + ".norm", options.size.in_features);
    const Tensor& packed = reader.weight();
    const Tensor& weight_scale = reader.weight();
    const std::optional<Tensor> bias = biased ? std::optional<Tensor>(reader.weight()) : std::nullopt;
    const CheckedMatrix matrix(kOp, name + ".", packed, weight_scale, bias, options);
    keep(packed, matrix.packed);
    keep(weight_scale, matrix.weight_scale);
    if (biased) keep(*bias, *matrix.bias);
    projection.matrix = matrix.view;
    return projection;
  }

  void read_layer(PlanReader& reader) {
    const std::string name = "layers[" + std::to_string(layers_.size()) + "].";
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    Layer layer{};
    layer.head_dim = reader.number(name + "head_dim", 2, kMost);
    layer.rotation = reader.number(name + "rotation", 0, kMost);
    layer.window = reader.number(name + "window", 0, kMost);
    layer.activation = static_cast<Activation>(reader.number(name + "activation", 0, 2));
    const double query_scale = reader.constant();
    layer.score_scale = score_scale(query_scale == 0.0 ? std::nullopt : std::optional(query_scale), layer.head_dim);
    layer.residual_scale = static_cast<float>(reader.constant());
    bool has_norm[kNorms];
    for (int n = 0; n < kNorms; ++n) has_norm[n] = reader.number(name + kNormNames[n], 0, 1) == 1;
    for (int p = 0; p < kProjections; ++p) {
      layer.projections[p] = read_projection(reader, name + kProjectionNames[p]);
    }
    const auto size = [&](ProjectionPlace p) { return layer.projections[p].matrix.size; };
    const int64_t hidden = layers_.empty() ? size(kQ).in_features : layers_[0].projections[kQ].matrix.size.in_features;
    const int64_t q = size(kQ).out_features, kv = size(kK).out_features, inner = size(kGate).out_features;
    const MatrixSize expected[kProjections] = {{q, hidden},     {kv, hidden},    {kv, hidden},   {hidden, q},
                                               {inner, hidden}, {inner, hidden}, {hidden, inner}};
    for (int p = 0; p < kProjections; ++p) {
      const MatrixSize given = layer.projections[p].matrix.size;
      if (given.out_features == expected[p].out_features && given.in_features == expected[p].in_features) continue;
      refuse(kOp, (name + kProjectionNames[p]).c_str(),
             shape_text({expected[p].out_features, expected[p].in_features}) + " (out_features, in_features)",
             shape_text({given.out_features, given.in_features}));
    }
    const int64_t features[kNorms] = {hidden, layer.head_dim, layer.head_dim, q, hidden, hidden, inner, hidden};
    for (int n = 0; n < kNorms; ++n) {
      if (has_norm[n]) layer.norms[n] = read_norm(reader, name + kNormNames[n], features[n]);
    }
    rotations_ = std::max(rotations_, layer.rotation + 1);
    layers_.push_back(layer);
  }

  static void check_heads(const Layer& layer, int64_t head_dim) {
    const int64_t q = layer.projections[kQ].features(), kv = layer.projections[kK].features();
    if (layer.head_dim == head_dim && q != 0 && kv != 0 && kv % head_dim == 0 && q % kv == 0) return;
    refuse(kOp, "structure",
           "q and k of whole heads of " + std::to_string(head_dim) +
               " (twice the last size of cos), those of k a divisor of those of q",
           "heads of " + std::to_string(layer.head_dim) + " in " + std::to_string(q) + " and " + std::to_string(kv) +
               " features");
  }

  LayersCache checked_cache(AttentionSizes sizes, const Tensor& keys, const std::optional<Tensor>& values,
                            const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale,
                            int64_t slot) const {
    if (!values.has_value()) refuse(kOp, "values", "a tensor where there are keys", "None");
    if (slot < 0) refuse(kOp, "slot", "a number of at least 0", std::to_string(slot));
    // More layers than these are fine: a user may have taken some away.
    const int64_t needed = slot + static_cast<int64_t>(layers_.size());
    const auto check_layers = [&](const char* argument, const Tensor& tensor) {
      if (tensor.dim() == 0 || tensor.size(0) < needed) {
        refuse(kOp, argument, "a tensor [layers, ...] for at least " + std::to_string(needed) + " layers",
               describe(tensor));
      }
    };
    check_layers("keys", keys);
    check_layers("values", *values);
    if (key_scale.has_value()) check_layers("key_scale", *key_scale);
    if (value_scale.has_value()) check_layers("value_scale", *value_scale);
    std::optional<CachePart> part;
    for (const Layer& layer : layers_) {
      if (part.has_value() && layer.kv_heads() == sizes.kv_heads) continue;
      sizes.kv_heads = layer.kv_heads();
      // Sizes and strides are the same for every layer's part, so what holds for the first holds for all.
      part = check_cache(kOp, sizes, first_of(keys), first_of(*values), first_of(key_scale), first_of(value_scale));
    }
    const int64_t element = part->type == CacheType::kFloat32 ? 4 : part->type == CacheType::kBFloat16 ? 2 : 1;
    return {part->type,
            part->capacity,
            part->keys,
            part->values,
            part->key_scale,
            part->value_scale,
            keys.stride(0) * element,
            values->stride(0) * element,
            key_scale.has_value() ? key_scale->stride(0) : 0,
            value_scale.has_value() ? value_scale->stride(0) : 0};
  }

  // Keys and values are laid out as in a cache, for one layer after another.
  LayersCache cache_for_this_call(const AttentionSizes& sizes, const std::optional<Tensor>& values,
                                  const std::optional<Tensor>& key_scale, const std::optional<Tensor>& value_scale,
                                  std::optional<Tensor>& own_keys, std::optional<Tensor>& own_values) const {
    if (values.has_value() || key_scale.has_value() || value_scale.has_value()) {
      refuse(kOp, "keys", "a tensor where there are values or scales", "None");
    }
    int64_t kv_heads = 0;
    for (const Layer& layer : layers_) kv_heads = std::max(kv_heads, layer.kv_heads());
    const int64_t capacity = round_up(sizes.tokens, kAttentionBlock);
    const int64_t places = sizes.batch * kv_heads * capacity;
    own_keys = empty({places * sizes.head_dim}, dtypes().float32);
    own_values = empty({places * value_width(sizes.head_dim)}, dtypes().float32);
    return {CacheType::kFloat32,
            capacity,
            mutable_data<void>(*own_keys),
            mutable_data<void>(*own_values),
            nullptr,
            nullptr,
            0,
            0,
            0,
            0};
  }

  std::vector<Memory> memory_;
  bool copied_ = false;
  std::vector<Layer> layers_;
  int64_t rotations_ = 0;  // tables of angles that the layers use
};

// Layers by number. They are checked again when their tensors have got other memory. The mutex is held for looking
// things up only: checking and dropping tensors may run Python, which may come back here.
class Prepared {
 public:
  int64_t add(Plan plan) {
    auto layers = std::make_shared<const CheckedLayers>(plan);
    auto entry = std::make_shared<Entry>(Entry{std::move(plan), std::move(layers)});
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.emplace(++last_, std::move(entry));
    return last_;
  }

  std::shared_ptr<const CheckedLayers> find(int64_t number) {
    std::shared_ptr<Entry> entry;
    std::shared_ptr<const CheckedLayers> layers;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = entries_.find(number);
      if (found != entries_.end()) {
        entry = found->second;
        layers = entry->layers;
      }
    }
    if (entry == nullptr) {
      refuse("run_prepared_layers", "prepared", "a number from prepare_layers that has not been released",
             std::to_string(number));
    }
    if (layers->is_current()) return layers;
    auto fresh = std::make_shared<const CheckedLayers>(entry->plan);
    layers = fresh;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      entry->layers.swap(fresh);
    }
    return layers;  // and what was there before goes, unlocked
  }

  void remove(int64_t number) {
    std::shared_ptr<Entry> gone;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = entries_.find(number);
    if (found == entries_.end()) return;
    gone.swap(found->second);
    entries_.erase(found);
  }  // the lock goes first, then the tensors: the other way round than they came

  std::mutex& mutex() { return mutex_; }

 private:
  struct Entry {
    const Plan plan;
    std::shared_ptr<const CheckedLayers> layers;  // under mutex_
  };

  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Entry>> entries_;
  int64_t last_ = 0;
};

// Never destroyed: at the end of the process, torch may be gone before its tensors.
Prepared& prepared_layers() {
  static Prepared* const all = new Prepared;
  return *all;
}

const bool forked_children_find_the_mutex_free =
    (call_around_forks([] { prepared_layers().mutex().lock(); }, [] { prepared_layers().mutex().unlock(); }), true);

}  // namespace

Tensor decoder_layers(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<int64_t>& structure,
                      const std::vector<double>& constants, const Tensor& cos, const Tensor& sin,
                      const std::optional<Tensor>& start, const std::optional<Tensor>& keys,
                      const std::optional<Tensor>& values, const std::optional<Tensor>& key_scale,
                      const std::optional<Tensor>& value_scale, int64_t slot) {
  const CheckedLayers layers({weights, structure, constants});
  return layers.run(x, cos, sin, start, keys, values, key_scale, value_scale, slot);
}

int64_t prepare_layers(const std::vector<Tensor>& weights, const std::vector<int64_t>& structure,
                       const std::vector<double>& constants) {
  return prepared_layers().add({weights, structure, constants});
}

Tensor run_prepared_layers(const Tensor& x, int64_t prepared, const Tensor& cos, const Tensor& sin,
                           const std::optional<Tensor>& start, const std::optional<Tensor>& keys,
                           const std::optional<Tensor>& values, const std::optional<Tensor>& key_scale,
                           const std::optional<Tensor>& value_scale, int64_t slot) {
  return prepared_layers().find(prepared)->run(x, cos, sin, start, keys, values, key_scale, value_scale, slot);
}

void release_layers(int64_t prepared) { prepared_layers().remove(prepared); }

}  // namespace bitnet_ops
