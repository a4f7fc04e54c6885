"use strict";

// The page of a job that is not finished: how far it is, about once a second, and in the end what came of it.
(() => {
    const SECOND = 1000;
    let patience = 0;

    async function read(url) {
        const answer = await fetch(url, { headers: { "X-Requested-With": "XMLHttpRequest" } });
        if (!answer.ok || answer.redirected) {
            throw new Error(`${answer.status} ${url}`);
        }
        return answer;
    }

    async function finish() {
        const answer = await read(window.location.href);
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        document.getElementById("job").replaceWith(page.getElementById("job"));
        document.querySelectorAll('a[href$="/cancel/"]').forEach((link) => link.closest("li").remove());
    }

    async function look() {
        const job = document.getElementById("job");
        try {
            const told = await (await read(job.dataset.progressUrl)).json();
            if (told.is_finished) {
                await finish();
                return;
            }
            job.querySelector(".job-state").firstElementChild.firstChild.textContent = told.state;
            job.querySelector(".job-sentence").textContent = told.sentence;
            job.querySelector(".meter").setAttribute("aria-valuenow", told.percent);
            job.querySelector(".meter-fill").style.width = `${told.percent}%`;
            patience = 0;
        } catch {
            // A server that is being started again will answer soon.
            patience = Math.min(patience + 1, 30);
        }
        setTimeout(look, SECOND * (1 + patience));
    }

    if (document.getElementById("job").dataset.progressUrl) {
        setTimeout(look, SECOND);
    }
})();
