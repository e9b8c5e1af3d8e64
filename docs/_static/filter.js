// A field above each table of the class "filtered": rows stay that contain all words typed, in any column.
addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".filtered")) {
    const rows = [...place.querySelectorAll("tbody tr")];
    const field = document.createElement("input"), count = document.createElement("span");
    field.type = "search";
    field.placeholder = "filter, e.g. resnet 8 to 32";
    field.setAttribute("aria-label", "filter the table");
    const apply = () => {
      const words = field.value.toLowerCase().split(/\s+/);
      for (const row of rows) {
        const text = [...row.cells].map((cell) => cell.textContent.toLowerCase()).join(" ");
        row.hidden = !words.every((word) => text.includes(word));
      }
      count.textContent = ` ${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
    };
    field.addEventListener("input", apply);
    place.prepend(field, count);
    apply();
  }
});
