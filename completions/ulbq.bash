# Completion of ulbq for bash 4.4 or newer; it asks ulbq itself. Source this file in ~/.bashrc, or copy it to
# ~/.local/share/bash-completion/completions/ulbq.

_ulbq() {
    local line current=${COMP_WORDS[COMP_CWORD]} IFS=$'\n'
    local -a words=()
    # bash splits --option=value at the equals sign
    for line in "${COMP_WORDS[@]:0:COMP_CWORD}"; do
        [[ $line == '=' ]] || words+=("$line")
    done
    [[ $current != '=' ]] || current=''
    COMPREPLY=()
    while read -r line; do
        case $line in
        :files | :folders)
            compopt -o filenames 2>/dev/null
            if [[ $line == :files ]]; then line=-f; else line=-d; fi
            mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen "$line" -- "$current")
            ;;
        :list) compopt -o nospace 2>/dev/null ;;
        *) COMPREPLY+=("$line") ;;
        esac
    done < <(env _ULBQ_COMPLETE=complete_bash _ULBQ_MARKS=1 \
        COMP_WORDS="${words[*]}"$'\n'"$current" COMP_CWORD="${#words[@]}" "$1" 2>/dev/null)
}

complete -F _ulbq ulbq
