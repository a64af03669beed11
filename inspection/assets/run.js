"use strict";
const large = document.getElementById("large");
const shown = document.getElementById("large-picture");
let opener = null;
for (const image of document.querySelectorAll(".picture img")) {
  image.decode().then(() => image.classList.toggle("pixels", image.naturalWidth <= 128), () => {});
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.picture");
  if (button) {
    const image = button.querySelector("img");
    opener = button;
    shown.src = image.src;
    shown.alt = image.alt;
    shown.className = image.className;
    document.getElementById("large-name").textContent = image.alt;
    large.showModal();
  } else if (event.target === large || event.target.id === "close") {
    large.close();
  }
});
large.addEventListener("close", () => opener && opener.focus());
