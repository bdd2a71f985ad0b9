// The k best of many scores: a threshold that they must reach, and their order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace bitnet_ops {

// Tokens are ranked by their logits, or, to sample, by logit / temperature + noise. Either grows with the logit,
// also as it is rounded, so bounds of logits turn into bounds of scores.
struct Score {
  double temperature;
  const float* noise;  // [vocabulary] or null

  double operator()(float logit, int64_t id) const {
    return noise == nullptr ? static_cast<double>(logit) : static_cast<double>(logit) / temperature + noise[id];
  }

  // Calls work(id) for the ids in [begin, end) whose score passes test(score, threshold). Few do, so 64 are looked
  // at together first, in vectors. `threshold` is the score of some logit, hence exact as float without noise.
  template <class Test, class Work>
  void where(const float* logits, int64_t begin, int64_t end, double threshold, Test test, Work work) const {
    if (noise == nullptr) {
      const float narrow = static_cast<float>(threshold);
      return scan(begin, end, [&](int64_t id) { return test(logits[id], narrow); }, work);
    }
    scan(begin, end, [&](int64_t id) { return test(logits[id] / temperature + noise[id], threshold); }, work);
  }

 private:
  template <class Passes, class Work>
  static void scan(int64_t begin, int64_t end, Passes passes, Work work) {
    for (; begin < end; begin += 64) {
      const int64_t stop = std::min(begin + 64, end);
      int any = 0;
      for (int64_t id = begin; id < stop; ++id) any |= passes(id);
      if (any == 0) continue;
      for (int64_t id = begin; id < stop; ++id) {
        if (passes(id)) work(id);
      }
    }
  }
};

// Tests for Score::where. A NaN bounds nothing: it survives, and does not count as a score that is reached.
inline constexpr auto kSurvives = [](auto score, auto threshold) { return !(score < threshold); };
inline constexpr auto kIsBetter = [](auto score, auto threshold) { return score > threshold; };

// The k-th largest of the numbers offered, NaN not counted.
class KthLargest {
 public:
  // `least` is known to be too small or equal.
  KthLargest(int64_t k, double least) : k_(static_cast<size_t>(k)), threshold_(least) {}

  void offer(double score) {
    if (!(score > threshold_)) return;
    best_.push_back(score);
    // Twice as many as needed before they are sorted out: a constant number of steps for each.
    if (best_.size() >= 2 * k_) shrink();
  }

  // `least` as long as there are not k.
  double threshold() {
    shrink();
    return threshold_;
  }

  void merge(const KthLargest& other) {
    for (const double score : other.best_) offer(score);
  }

 private:
  void shrink() {
    if (best_.size() < k_) return;
    std::nth_element(best_.begin(), best_.begin() + static_cast<int64_t>(k_) - 1, best_.end(), std::greater<double>());
    best_.resize(k_);
    threshold_ = best_[k_ - 1];
  }

  size_t k_;
  double threshold_;
  std::vector<double> best_;
};

struct Ranked {
  double score;
  float logit;
  int32_t id;
};

// NaN comes first, as for torch.max, so that it does not go unnoticed; of equals the one with the smaller id.
inline bool before(const Ranked& a, const Ranked& b) {
  const bool a_nan = std::isnan(a.score);
  const bool b_nan = std::isnan(b.score);
  if (a_nan || b_nan) return a_nan == b_nan ? a.id < b.id : a_nan;
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

// Collects the k first, in the order of `before`.
class Best {
 public:
  explicit Best(int64_t k) : k_(static_cast<size_t>(k)) {}

  void offer(const Ranked& candidate) {
    if (full_ && !before(candidate, last_)) return;
    list_.push_back(candidate);
    if (list_.size() >= 2 * k_) shrink();
  }

  void write(float* logits, int64_t* ids) {
    std::sort(list_.begin(), list_.end(), before);
    for (size_t i = 0; i < k_; ++i) {
      logits[i] = list_[i].logit;
      ids[i] = list_[i].id;
    }
  }

 private:
  void shrink() {
    std::nth_element(list_.begin(), list_.begin() + static_cast<int64_t>(k_) - 1, list_.end(), before);
    list_.resize(k_);
    last_ = list_[k_ - 1];
    full_ = true;
  }

  size_t k_;
  bool full_ = false;
  Ranked last_{};
  std::vector<Ranked> list_;
};

}  // namespace bitnet_ops
