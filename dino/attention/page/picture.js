"use strict";

/** A picture of the page: its weights, decoded when first needed, and the heads that are switched on. */
class Picture {
  constructor(article, index) {
    this.article = article;
    this.index = index;
    this.image = article.querySelector("img");
    this.name = article.querySelector("h2").textContent;
    const atFirst = article.dataset.on.split(",");
    this.on = Array.from({ length: Number(article.dataset.heads) }, (_, head) => atFirst.includes(String(head)));
    this.viewer = new Viewer(this, article.querySelector(".place"), this.image);
    article.addEventListener("focusin", () => (touched = this));
  }

  get maps() {
    if (!this.decoded) {
      const { heads, tops, ...grid } = JSON.parse(this.article.querySelector(".maps").textContent);
      const weights = heads.map((text, head) => decodeWeights(text, tops[head]));
      const scaled = weights.map((values) => normalize(values, limits(values, scale, grid.patches)));
      this.decoded = { grid, heads: weights, scaled, rankings: [] };
    }
    return this.decoded;
  }

  get chosen() {
    return this.on.flatMap((on, head) => (on ? [head] : []));
  }

  /** The switched-on heads as one map, and its patches by weight. */
  get combined() {
    const key = `${state.how} ${this.chosen}`;
    if (this.kept?.key !== key) {
      const values = combine(this.chosen.map((head) => this.maps.heads[head]), state.how);
      this.kept = { key, values, ranking: rank(values) };
    }
    return this.kept;
  }

  get mask() {
    return massMask(this.combined.ranking, state.threshold);
  }

  /** Whose colour each patch has, and the colours, among the switched-on heads. */
  get owners() {
    const { heads, rankings } = this.maps;
    for (const head of this.chosen) rankings[head] ??= rank(heads[head]);
    const [on, ranked] = [heads, rankings].map((all) => this.chosen.map((head) => all[head]));
    return owners(on, ranked, state.threshold);
  }

  /** Give back the memory, unless the picture is near the screen. */
  letGo() {
    if (!this.viewer.near && largeViewer?.picture !== this) this.decoded = this.kept = undefined;
  }

  /** What is shown, in words. */
  describe() {
    const heads = this.chosen;
    if (!heads.length) return "No head is switched on.";
    const subject = this.subject(heads);
    const { ranking } = this.combined;
    if (!ranking.mass[ranking.mass.length - 1]) return `${subject} ${heads.length > 1 ? "have" : "has"} no attention to show.`;
    const keep = percent(state.threshold);
    if (state.view === "colours" && heads.length > 1) {
      const together = percent(coveredArea(this.owners, this.maps.grid));
      return `${subject} keep ${keep} of their attention each, together in ${together} of the picture.`;
    }
    const which = heads.length > 1 ? `The ${state.how === "max" ? "maximum" : "mean"} of ${lower(subject)}` : subject;
    const area = percent(coveredArea(this.mask, this.maps.grid));
    return `${which} keeps ${keep} of its attention in ${area} of the picture.`;
  }

  subject(heads) {
    return heads.length > 1 && heads.length === this.on.length ? `All ${heads.length} heads` : listed(heads);
  }
}

function listed(heads) {
  if (heads.length === 1) return `Head ${heads[0]}`;
  return `Heads ${heads.slice(0, -1).join(", ")} and ${heads.at(-1)}`;
}

function lower(text) {
  return text[0].toLowerCase() + text.slice(1);
}

function percent(part) {
  const value = 100 * part;
  if (value > 0 && value < 0.1) return "less than 0.1 %";
  return `${value < 10 ? Number(value.toFixed(1)) : Math.round(value)} %`;
}
