"""Prompts that are about neither math, code nor reasoning: what the classifiers call "other".

OTHER_PROMPTS: split -> kind -> prompts. No kind is in two splits.
"""


def read_kinds(text: str) -> dict[str, list[str]]:
    """Kind -> prompts. A paragraph has the name of a kind, and then a prompt in each line."""
    kinds = {}
    for paragraph in text.strip().split("\n\n"):
        kind, *prompts = paragraph.splitlines()
        kinds[kind] = prompts
    return kinds


TRAIN = """
sports
Who won the last football World Cup?
How do I get better at table tennis?
Explain the offside rule to me.
Which city has the best basketball team?
What are good stretches before a run?

fashion
What should I wear to a summer wedding?
Do brown shoes go with a navy suit?
How do I tie a bow tie?
Which colours suit people with red hair?
Where can I buy a warm winter coat?

books
Recommend a good crime novel.
Who wrote Pride and Prejudice?
What is the plot of Moby Dick?
Which book should I give to a ten-year-old who loves horses?
Tell me about the main characters of Hamlet.

rewording
Make this text shorter: we regret to inform you that the shop is closed.
Rewrite this in formal English: gonna be late, sorry.
Correct the grammar: she don't like tea.
Find a better word for nice.
Summarise in one sentence what a fairy tale is.

games
Let us play a guessing game.
How do I set up a game of Monopoly?
Name a party game for a rainy afternoon.
Tell me a riddle.
What is a good opening line for charades?

politics
Who is the president of France?
How does the British parliament pass a law?
What is the difference between a senator and a governor?
When are the next elections in Canada?
Why do some countries have a king?

mythology and religion
Who was Athena in Greek mythology?
Tell me the legend of King Arthur.
What do people celebrate at Easter?
Why was Thor feared by the giants?
What is the story of Noah about?

family and feelings
My best friend is angry with me. What can I say?
How do I tell my parents that I am moving out?
I miss my sister very much.
How do I cheer up a sad colleague?
Is it all right to cry at a wedding?

shopping
Which phone should I buy for my mother?
Where can I find cheap furniture?
Is it better to rent or to buy a piano?
What do I need for a picnic?
How can I return a parcel to the shop?

art
Who painted the Mona Lisa?
How do I draw a face with a pencil?
What makes a good photograph?
Tell me something about Frida Kahlo.
Which museums in Amsterdam are the best?
"""

VALIDATION = """
geography
What is the capital of Portugal?
Which countries border Switzerland?
Name some islands in the Pacific.
Where is Timbuktu?

jokes
Tell me a joke about penguins.
Make me laugh.
Do you know a funny story about a teacher?
What is a good pun about bread?

work
How do I ask my boss for a day off?
What does a notary do all day?
Give me ideas for a team event.
Say something motivating before my meeting.

home
How do I get a wine stain out of a carpet?
How often should I wash my curtains?
Which lamp fits a small hallway?
How do I fold a fitted sheet?
"""

TEST = """
small talk
Hi there, how are you doing today?
Good morning! Did you sleep well?
Thanks a lot, you have been very kind.
What is your name?
I am bored. Tell me something nice.
It was a pleasure talking to you, goodbye!

translation
Translate into French: the children are playing in the garden.
How do you say "thank you very much" in Japanese?
What does the German word "Heimweh" mean in English?
Translate this sentence into Spanish: where is the nearest train station?
Put this into Italian for me: we would like a table by the window.
What is the Portuguese word for butterfly?

history
Who was the first emperor of Rome?
Why did the French Revolution begin?
Tell me about the life of Queen Elizabeth the First.
When was the Great Wall of China built?
Which countries fought in the Crimean War?
Describe how the Berlin Wall came down.

cooking
How do I make a simple tomato soup?
Give me a recipe for banana bread.
What can I cook with leftover rice and some vegetables?
How do I keep pancakes from sticking to the pan?
Suggest a dessert that goes well with coffee.
Which herbs go well with roast chicken?

travel
What should I see on a weekend in Lisbon?
Recommend a quiet beach in Greece.
What should I pack for a hiking trip in Norway?
Is it better to visit Kyoto in spring or in autumn?
How do I get from the airport to the centre of Prague?
Plan a family holiday in Scotland for me.

letters
Write a polite e-mail to my landlord about the broken heating.
Help me write a birthday card for my grandmother.
Draft a cover letter for a job as a gardener.
Write an apology to a friend whose party I missed.
Invite my colleagues to a farewell lunch in a short message.
Make this sentence sound friendlier: send me the report today.

stories and poems
Write a short poem about the sea at night.
Tell me a bedtime story about a brave little fox.
Write the first lines of a novel set in Venice.
Compose a limerick about a lazy cat.
Describe an old house in the style of a ghost story.
Invent a name for a dragon who loves tea.

music and films
Who sang the song Yesterday?
Recommend a film for a rainy Sunday.
Which instrument did Miles Davis play?
Who directed the film Casablanca?
Suggest some quiet piano music for the evening.
What is the opera Carmen about?

advice
How can I make friends in a new town?
My neighbour plays loud music at night. What should I do?
What would be a good present for my father?
How do I prepare for a job interview?
I feel nervous before speaking in public. Any tips?
Should I adopt a dog or a cat?
"""

OTHER_PROMPTS: dict[str, dict[str, list[str]]] = {
    "train": read_kinds(TRAIN),
    "validation": read_kinds(VALIDATION),
    "test": read_kinds(TEST),
}
