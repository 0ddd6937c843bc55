// What people have said about exposures, for filters: exclusion, ratings, tags and notes.

/** Whether an exposure has all words: parts of its name or note, `excluded`, `rating:N`, `tag:NAME`. `values`: "ROW NAME" -> { value }. */
export function fits(values, row, name, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every((word) => {
    if (word === "excluded") return values.has(`${row} leave_out`);
    if (word.startsWith("tag:")) return [...values.keys()].some((key) => key.toLowerCase().startsWith(`${row} ${word}`));
    if (word.startsWith("rating:")) return values.get(`${row} rating`)?.value === word.slice(7);
    return name.toLowerCase().includes(word) || (values.get(`${row} note`)?.value || "").toLowerCase().includes(word);
  });
}

/** The values as the server lists them, by row and name. */
export const byRow = (listed) => new Map(listed.map(([row, name, value, who]) => [`${row} ${name}`, { value, who }]));
