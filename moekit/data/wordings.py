"""How the embedded tasks ask: the cluster and ten wordings of each."""

# task: (cluster, ten wordings); {x} is what is asked about, {y} a second thing
WORDINGS = {
    "addition": (
        "arithmetic",
        """What is {x}?|Calculate {x}.|{x} =|Add: {x}|Work out {x}.|Find the
        sum {x}.|How much is {x}?|Give the result of {x}.|The sum of {x} is|Compute {x}.""",
    ),
    "subtraction": (
        "arithmetic",
        """What is {x}?|Subtract: {x}|{x} =|Compute the difference
        {x}.|How much remains of {x}?|Evaluate {x}.|Work out {x}.|What does {x} give?|Find
        {x}.|The difference {x} is""",
    ),
    "word_problem": (
        "arithmetic",
        """{x} How many {y} are left?|{x} Count the {y} now.|{x} What
        number of {y} is that?|Solve: {x} How many {y}?|{x} How many {y} remain?|Story: {x} Number
        of {y} at the end?|{x} The {y} left over are|{x} Give the number of {y}.|Read this. {x} How
        many {y} now?|{x} Say how many {y} there are.""",
    ),
    "next_number": (
        "arithmetic",
        """Continue: {x}|What comes after {x}?|{x}, and then?|Which number
        follows {x}?|Complete the series {x}.|Find the next number: {x}|The series {x} goes on
        with|Next in line after {x}?|Extend {x} by one.|{x} ... what is next?""",
    ),
    "largest": (
        "comparison",
        """Which is the largest: {x}?|Pick the greatest of {x}.|Find the
        maximum of {x}.|{x}: which is most?|The biggest of {x} is|Name the highest number:
        {x}|Largest among {x}?|Of {x}, which is above the rest?|Choose the largest number. {x}|What
        is the top value in {x}?""",
    ),
    "parity": (
        "comparison",
        """Is {x} even or odd?|{x}: even or odd?|Tell the parity of {x}.|The
        number {x} is|Say if {x} is odd or even.|What parity has {x}?|Even or odd: {x}|Decide:
        {x} is even or odd.|Does {x} count as odd or even?|Classify {x} as even or odd.""",
    ),
    "divisible": (
        "comparison",
        """Is {x} divisible by {y}?|Does {y} divide {x}?|Can {x} be split
        into {y} equal parts?|Is {x} a multiple of {y}?|{x} / {y} leaves no rest?|Does {x} appear
        in the table of {y}?|Check: {y} divides {x}.|Is {y} a factor of {x}?|Will {x} over {y} be
        whole?|True division of {x} by {y}: whole?""",
    ),
    "boolean": (
        "logic",
        """Evaluate: {x}|{x} is|What is the value of {x}?|True or False: {x}|Decide
        {x}.|Give the truth value of {x}.|Simplify {x}.|The expression {x} gives|Is this true?
        {x}|Work out the logic: {x}""",
    ),
    "navigate": (
        "logic",
        """Facing one way: {x} Back at the start?|{x} Do you return?|Start here.
        {x} Are you where you began?|{x} Is that the starting point?|Walk: {x} Same place?|{x} Did
        you come back?|Follow this. {x} Home again?|{x} Do the moves cancel?|Moves: {x} Do you end
        at the start?|After this, are you back? {x}""",
    ),
    "longest_word": (
        "words",
        """Which word is longest: {x}?|Pick the longest of {x}.|The longest
        word in {x} is|{x}: which has most letters?|Find the word with most letters: {x}|Longest
        among {x}?|Name the longest. {x}|Of {x}, which word is longest?|Say the longest word here:
        {x}|Which has the greatest length: {x}?""",
    ),
    "last_word": (
        "words",
        """What is the last word: {x}|{x} - which word ends this?|Repeat the
        final word. {x}|The line "{x}" ends with|Give the last word of: {x}|Which word closes
        "{x}"?|Copy the word at the end: {x}|Find the final word in {x}|{x} Last word?|Say the word
        that comes last. {x}""",
    ),
    "first_word": (
        "words",
        """What is the first word: {x}|{x} - which word opens this?|Repeat the word at the start.
        {x}|The line "{x}" begins with|Give the first word of: {x}|Which word leads "{x}"?|Copy the
        word at the start: {x}|Find the opening word in {x}|{x} First word?|Say the word that comes
        first. {x}""",
    ),
    "word_after": (
        "words",
        """Which word follows {y}: {x}|{x} - what comes after {y}?|After {y} there is what? {x}|In
        "{x}", the word behind {y} is|Give the word right after {y}. {x}|{x} Next after {y}?|Find
        {y}, say the next word: {x}|What stands after {y} in {x}|Line: {x} Word following {y}?|Read
        on from {y}: {x}""",
    ),
    "repeated_word": (
        "words",
        """Which word occurs twice: {x}|Find the repeated word. {x}|{x} -
        what is said twice?|One word is there two times: {x}|The doubled word in "{x}" is|Spot the
        duplicate: {x}|What word repeats in {x}|{x} Which word comes again?|Name the word that
        appears twice. {x}|Find the word used two times: {x}""",
    ),
    "alphabetical": (
        "words",
        """Which comes first in the alphabet: {x}?|Sort {x}. Which is
        first?|First in a dictionary: {x}?|Of {x}, name the earliest by alphabet.|{x}: first in
        order?|Put {x} in order; say the first.|Alphabetically first among {x}?|Which leads a
        sorted list of {x}?|The first of {x} in ABC order is|Pick the one nearest to A: {x}""",
    ),
    "count_letter": (
        "words",
        """How many {y} are in "{x}"?|Count the letter {y}: {x}|{x} - number
        of {y}?|How often does {y} occur in {x}?|In "{x}", count {y}.|The letter {y} is in "{x}"
        how often?|Find the count of {y} in {x}.|Tally {y} in: {x}|Number of times {y} is in
        "{x}"|How many times is {y} written in {x}?""",
    ),
    "mentioned": (
        "matching",
        """Which word is in this line? {x}|{x} - which of these is said?|Find
        the word that occurs in: {x}|What word appears here? {x}|Line: {x}. Which word is in
        it?|Read: {x}. Which one was there?|{x} Choose the word from the line.|One of the words is
        in "{x}". Which?|Spot the word from this text: {x}|Which one is part of "{x}"?""",
    ),
    "text_word": (
        "matching",
        """Which word is in this text? {x}|{x} Which of these words was there?|Find a word of this
        text: {x}|Documentation: {x} Which word is in it?|{x} Name a word from it.|Which word does
        this use? {x}|Say a word that this has: {x}|Text: {x} One of its words?|{x} Choose the word
        from the text.|Spot a word of the sentence: {x}""",
    ),
    "owned": (
        "matching",
        """{x} What has {y}?|{x} {y} has the|Read: {x} What is with {y}?|{x} Name the thing of
        {y}.|Who has what? {x} And {y}?|{x} Which thing is {y}'s?|Look it up: {x} {y} has|{x} And
        {y}, what is there?|List: {x} Thing of {y}?|{x} Say what {y} has.""",
    ),
    "prefix": (
        "matching",
        """Which word starts with {x}?|Find the word beginning with {x}.|{x}...
        is the start of|Complete {x} to a word.|Word that opens with {x}?|What begins {x}-?|A word
        with the first letters {x} is|Pick the word whose start is {x}.|"{x}" are the first
        letters of|Start: {x}. Word?""",
    ),
    "suffix": (
        "matching",
        """Which word ends with {x}?|Find the word ending in {x}.|...{x} is the
        end of|What word finishes with {x}?|Word that closes with {x}?|A word with the last letters
        {x} is|Pick the word whose end is {x}.|"{x}" are the last letters of|End: {x}. Word?|What
        ends -{x}?""",
    ),
    "topic_title": (
        "reference",
        """Title of this text? {x}|{x} What is this about?|Name the topic:
        {x}|Which heading fits? {x}|This passage explains: {x} Its title?|{x} Choose a title.|Find
        the headline for: {x}|What would you call this section? {x}|Text: {x} Topic?|Under which
        title stands this? {x}""",
    ),
    "module_name": (
        "reference",
        """Which module says: {x}|{x} Name the module.|Module described as
        "{x}"?|What module is this? {x}|A module's text: {x} Which one?|Find the module: {x}|"{x}"
        describes the module|Name what is described: {x}|Guess the module. {x}|Documentation: {x}
        Module?""",
    ),
    "owner_package": (
        "reference",
        """Which package has {x}?|{x} belongs to|In what package is
        {x}?|Name the package of {x}.|Where does {x} live?|{x} is part of which package?|Find the
        home of {x}.|Which library offers {x}?|Package with {x}?|Who provides {x}?""",
    ),
    "http_status": (
        "codes",
        """What does HTTP {x} mean?|Status {x}?|Name the HTTP status {x}.|HTTP
        code {x} stands for|A server answers {x}. Meaning?|Explain status code {x}.|{x} in HTTP
        is|Give the phrase for HTTP {x}.|What phrase goes with {x}?|Web status {x}:""",
    ),
    "unicode_name": (
        "codes",
        """Which character is {x}?|Write {x}.|Show the sign called {x}.|{x}
        looks like|The symbol named {x} is|Give the character {x}.|Unicode {x}:|Draw {x}.|Sign for
        {x}?|What is written for {x}?""",
    ),
    "zone_region": (
        "codes",
        """In which region is the zone of {x}?|{x} lies in|Region of the time
        zone {x}?|Where is {x}?|The zone of {x} belongs to|Name the region of {x}.|Which part of
        the world is {x} in?|Place {x}: region?|Find the region for {x}.|Time zone of {x}: which
        region?""",
    ),
    "function_name": (
        "description matching",
        """Which function does this? {x}|{x} Name the
        function.|A function documented as "{x}" is called|What is the function that does this:
        {x}|Function for: {x}|"{x}" describes|Find the name. {x}|What would this be called? {x}|Doc:
        {x} Function name?|Pick the function described by: {x}""",
    ),
    "class_name": (
        "description matching",
        """Which class is this? {x}|{x} Name the class.|A class
        documented as "{x}" is called|What class fits: {x}|Class for: {x}|"{x}" describes the
        class|Find the class. {x}|How is this class called? {x}|Doc: {x} Class name?|Pick the class
        described by: {x}""",
    ),
    "phrase_with": (
        "text selection",
        """Which phrase has the word {x}?|Find the phrase with {x} in
        it.|{x} is part of which phrase?|Select the line containing {x}.|Where does {x} occur?|Which
        line says {x}?|Look for {x}. Which phrase?|The phrase with {x} is|Search {x}:|Pick the text
        that mentions {x}.""",
    ),
    "sentence_with": (
        "text selection",
        """Which sentence mentions {x}?|Find the sentence about {x}.|{x} is said in which
        sentence?|Select the sentence containing {x}.|Where is {x} mentioned?|Which line of
        documentation has {x}?|Look for {x}. Which sentence?|The sentence with {x} is|Search the
        text for {x}:|Pick the sentence that names {x}.""",
    ),
    "shared_word": (
        "text selection",
        """Which word is in both lines? {x}|{x} What do the two lines share?|Find the word that both
        have: {x}|Two lines: {x} The word in each is|{x} Name the common word.|Compare the lines.
        {x} Shared word?|What is said on either side? {x}|{x} Which word do both contain?|The lines
        {x} have in common|Say the word that both lines use: {x}""",
    ),
    "gap_word": (
        "cloze",
        """{x} What fills the gap?|Fill in ___: {x}|{x} The missing word is|Which word is left
        out? {x}|Text: {x} What stands for ___?|{x} Replace ___ by|Complete the text. {x}|What
        belongs at ___? {x}|Read: {x} The word at ___ is|Say the word that is missing. {x}""",
    ),
    "missing_item": (
        "cloze",
        """{x} What is missing the second time?|Two lists, one word lost: {x}|{x} Which word was
        left out?|Compare: {x} What is gone?|The lists {x} differ by|Find the absent word: {x}|{x}
        Name what was forgotten.|Which one is no longer there? {x}|Lost from the second list:
        {x}|{x} Which is not repeated?""",
    ),
    "spelled": (
        "words",
        """What word is spelled {x}?|Join the letters {x}.|{x} makes|Read {x} as
        a word.|Put together: {x}|Which word is {x}?|Letters {x} give the word|Spell out: {x}|Write
        {x} as one word.|Without dashes, {x} is""",
    ),
    "swaps": (
        "state tracking",
        """{x} What does {y} have?|{x} {y} now has the|Follow the swaps. {x}
        {y} has|{x} In the end, {y} holds the|Who has what? {x} And {y}?|Track: {x} What is with
        {y}?|{x} Name the thing of {y}.|After this, what has {y}? {x}|{x} Which thing is
        {y}'s?|Things move: {x} {y} ends with the""",
    ),
    "weekday": (
        "state tracking",
        """Today is {x}. What day is it in {y} days?|It is {x}; {y} days
        later it is|{y} days after {x}?|Add {y} days to {x}.|From {x}, go {y} days on: which
        day?|If now is {x}, name the day {y} days ahead.|{x} plus {y} days is|Count {y} days from
        {x}.|Which weekday follows {x} by {y} days?|In {y} days from {x} it will be""",
    ),
    "dyck": (
        "state tracking",
        """Close the brackets: {x}|{x} needs|Complete {x}|What closes
        {x}?|Finish the sequence {x}|Which brackets end {x}?|Balance {x} with|The rest of {x}
        is|Add what is missing: {x}|End {x} properly:""",
    ),
}
